r"""Does latent pretraining help? The whole comparison on the embedded world, in one command.

    python launch/experiment.py pretraining --workdir=runs/experiment
    python launch/experiment.py data_efficiency --workdir=runs/data_efficiency

`pretraining`: the embedded model with nothing more, with captions under the next-token loss alone, and with latent
pretraining (the same captions, steps and replay); each is then fine-tuned and evaluated on the GQA-like questions and
on BLINK's four sub-tasks that the embedded world has, over several seeds. `data_efficiency`: the same three, fine-tuned
on 1, 5, 10, 25 and 100 % of the training records (its pictures need the extra `plots`).

Every run is a command of its own (printed) in a workdir of its own: killed and started again, the whole goes on where
it was. It ends with a table of means over seeds with 95 % intervals, in `table.md`; what it was made from is in
`table.json`.
"""

import argparse
import importlib.util
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ARMS = {
    "nothing": None,
    "next token": {"loss.similarity_weight": 0, "loss.alignment_weight": 0},
    "latent": {},
}
SHARES = (0.01, 0.05, 0.1, 0.25, 1.0)
RECORDS = 12_000  # of the two training splits together: scenes_questions and scenes_blink
EVALUATIONS = {
    "gqa": {"benchmark": "gqa", "data.name": "scenes_questions", "data.split": "test"},
    "blink": {"benchmark": "blink", "data.name": "scenes_blink", "data.split": "validation"},
}
METRICS = {
    "gqa": ("accuracy", "binary", "open", "consistency"),
    "blink": ("Counting", "Jigsaw", "Relative_Reflectance", "Spatial_Relation", "macro"),
}
# Two-sided 97.5 % quantiles of Student's t by degrees of freedom: intervals of a few seeds' mean.
STUDENT = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python launch/experiment.py", description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("pretraining", "data_efficiency"))
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated; each has its own data order and head")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="STAGE.KEY=VALUE",
        help="pretrain, finetune or evaluate, and a setting of its config: --set=finetune.train.steps=600",
    )
    options = parser.parse_args(arguments)
    seeds, extra = [int(seed) for seed in options.seeds.split(",")], settings(options.set)
    shares = SHARES if options.what == "data_efficiency" else (1.0,)
    found = []
    if len(shares) > 1:
        drawable()  # said before the hours, not only after them
    for seed in seeds:
        for arm in ARMS:
            model = pretrained(options.workdir, arm, seed, extra)
            for share in shares:
                scores = tuned_and_scored(options.workdir, arm, seed, share, model, extra)
                records = round(RECORDS * share)
                found.append({"arm": arm, "seed": seed, "share": share, "records": records, **scores})
    options.workdir.mkdir(parents=True, exist_ok=True)
    (options.workdir / "table.json").write_text(json.dumps(found, indent=2) + "\n")
    lines = table(found, shares)
    (options.workdir / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    if len(shares) > 1 and drawable():
        draw(options.workdir, found)


def drawable() -> bool:
    """Whether matplotlib is here; where it is not, says so: the table is worth having without pictures."""
    found = importlib.util.find_spec("matplotlib") is not None
    if not found:
        print("no pictures: they need matplotlib (pip install latent_jax[plots])", file=sys.stderr, flush=True)
    return found


def draw(workdir: Path, found: list[dict]) -> None:
    """A picture for each benchmark's overall metric: accuracy against training records."""
    from latent_jax.analysis.plots import accuracy_by_examples

    seeds = len({row["seed"] for row in found})
    for metric in ("gqa/accuracy", "blink/macro"):
        curves = {}
        for arm in ARMS:
            points = {row["records"]: [] for row in found if row["arm"] == arm}
            for row in found:
                if row["arm"] == arm:
                    points[row["records"]].append(row[metric])
            curves[arm] = [(count, statistics.fmean(values), half_width(values)) for count, values in points.items()]
        file = workdir / f"{metric.replace('/', '-')}.png"
        accuracy_by_examples(curves, file, title=f"{metric} after fine-tuning, {seeds} seed(s)")
        print(file)


def settings(pairs: list[str]) -> dict[str, dict[str, str]]:
    """{stage: {key: value}} of the command line's --set."""
    found = {"pretrain": {}, "finetune": {}, "evaluate": {}}
    for pair in pairs:
        stage, _, rest = pair.partition(".")
        key, equals, value = rest.partition("=")
        if stage not in found or not key or not equals:
            sys.exit(f"error: --set={pair}: expected STAGE.KEY=VALUE with a stage of {', '.join(found)}")
        found[stage][key] = value
    return found


def pretrained(workdir: Path, arm: str, seed: int, extra) -> str:
    """The HF directory that fine-tuning starts from; "" is the embedded model itself."""
    if ARMS[arm] is None:
        return ""
    directory = workdir / f"pretrain-{slug(arm)}-{seed}"
    chosen = {"seed": seed, **ARMS[arm], **extra["pretrain"]}
    run("configs/pretrain.py", directory, chosen, directory / "imagination.json")
    return str(directory / "hf")


def tuned_and_scored(workdir: Path, arm: str, seed: int, share: float, model: str, extra) -> dict[str, float]:
    """Fine-tunes and evaluates: {benchmark/metric: percent}."""
    name = f"{slug(arm)}-{seed}-{share:g}"
    directory = workdir / f"finetune-{name}"
    chosen = {
        "seed": seed,
        "model.path": model,
        "data.name": "scenes_questions:0.5,scenes_blink:0.5",
        "data.share": share,
        **extra["finetune"],
    }
    run("configs/finetune.py", directory, chosen, directory / "hf" / "config.json")
    scores = {}
    for benchmark, asked in EVALUATIONS.items():
        place = workdir / f"evaluate-{benchmark}-{name}"
        chosen = {**asked, "model.path": directory / "hf", **extra["evaluate"]}
        run("configs/evaluate.py", place, chosen, place / "results.json")
        metrics = json.loads((place / "results.json").read_text())["metrics"]
        scores |= {f"{benchmark}/{metric}": metrics[metric] for metric in METRICS[benchmark]}
    return scores


def run(config: str, directory: Path, chosen: dict, done: Path) -> None:
    """One command, unless what it leaves at its end is there."""
    if done.exists():
        return
    command = [sys.executable, "-m", "latent_jax.main", f"--config={config}", f"--workdir={directory}"]
    command += [f"--config.{key}={value}" for key, value in chosen.items()]
    print(" ".join(map(str, command)), flush=True)
    if code := execute(command):
        sys.exit(f"error: {directory}: the command above ended with {code}; the next start goes on from here")


def execute(command: list[str]) -> int:
    return subprocess.run(command, cwd=ROOT).returncode


def slug(arm: str) -> str:
    return arm.replace(" ", "_")


def table(found: list[dict], shares) -> list[str]:
    """Markdown: means over seeds with 95 % intervals, and each arm's difference from `nothing`, paired by seed."""
    metrics = [key for key in found[0] if "/" in key]
    lines = []
    for share in shares:
        rows = [row for row in found if row["share"] == share]
        seeds = sorted({row["seed"] for row in rows})
        spread = " ± 95 % interval of the mean" if len(seeds) > 1 else ""
        values = {(row["arm"], row["seed"]): row for row in rows}
        lines += [
            "",
            f"{share:.0%} of the training records, {len(seeds)} seed(s), percent{spread}",
            "",
        ]
        lines += ["| arm | " + " | ".join(metrics) + " |", "|---" * (len(metrics) + 1) + "|"]
        for arm in ARMS:
            cells = [interval([values[arm, seed][metric] for seed in seeds]) for metric in metrics]
            lines.append(f"| {arm} | " + " | ".join(cells) + " |")
        for arm in list(ARMS)[1:]:
            gains = [[values[arm, s][m] - values["nothing", s][m] for s in seeds] for m in metrics]
            lines.append(f"| {arm} less nothing | " + " | ".join(interval(gain, sign="+") for gain in gains) + " |")
    return lines[1:]


def interval(values: list[float], sign: str = "") -> str:
    mean, half = statistics.fmean(values), half_width(values)
    return f"{mean:{sign}.1f}" if math.isnan(half) else f"{mean:{sign}.1f} ± {half:.1f}"


def half_width(values: list[float]) -> float:
    """Of the 95 % interval of a mean over seeds, by Student's t; NaN for one seed."""
    if len(values) == 1:
        return math.nan
    return STUDENT[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))


if __name__ == "__main__":
    main()
