"""Pictures of results. Needs matplotlib (the extra `plots`)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from latent_jax.errors import UserError


def accuracy_by_examples(
    curves: Mapping[str, Sequence[tuple[int, float, float]]],
    file: str | Path,
    *,
    title: str,
    chance: float | None = None,
) -> None:
    """Writes a PNG: for every arm, accuracy (percent, with its half-width) against the number of training records.

    curves: arm -> (records, percent, half-width; NaN draws no bar), in any order. Raises UserError without matplotlib.
    """
    try:
        import matplotlib
    except ImportError:
        raise UserError("pictures need matplotlib: pip install -c constraints.txt -e '.[plots]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5.5, 3.8), layout="constrained")
    for shift, (arm, points) in enumerate(curves.items()):
        records, values, halves = zip(*sorted(points), strict=True)
        # Side by side, so that bars of equal numbers of records can be told apart.
        places = [count * 1.03 ** (shift - (len(curves) - 1) / 2) for count in records]
        axes.errorbar(places, values, yerr=halves, marker="o", markersize=4, capsize=3, label=arm)
    if chance is not None:
        axes.axhline(chance, color="gray", linestyle=":", label="chance")
    axes.set_xscale("log")
    ticks = sorted({count for points in curves.values() for count, _, _ in points})
    axes.set_xticks(ticks, [f"{count:,}" for count in ticks])
    axes.minorticks_off()
    axes.set(xlabel="training records", ylabel="accuracy, percent", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=150)
    plt.close(figure)
