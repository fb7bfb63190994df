"""results.json of an evaluation, and its table."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from latent_jax.benchmarks import VERSION, lmms_eval
from latent_jax.benchmarks.estimates import Estimate
from latent_jax.benchmarks.items import ScoredItem
from latent_jax.config.evaluation import Evaluation
from latent_jax.errors import UserError
from latent_jax.evaluation import predictions
from latent_jax.evaluation.predictions import PREDICTIONS, RESULTS
from latent_jax.evaluation.questions import Asked
from latent_jax.runtime import provenance

_LISTED = 100  # skipped questions that results.json lists


def collect(
    config: Evaluation,
    benchmark: ModuleType,
    data: Asked,
    settings: Mapping[str, Any],
    rows: Sequence[ScoredItem],
    report: Mapping[str, Estimate],
    skipped: Sequence[str],
    tokens: int,
) -> dict:
    """What results.json holds, but for the throughput."""
    scorer = config.evaluate.scorer
    unasked = [f"question {row.item.id}: {row.skipped}" for row in rows if row.skipped]
    scored = sum(row.correct is not None for row in rows)
    return {
        "benchmark": config.benchmark,
        "split": data.split,
        "scorer": scorer,
        "scorer_version": VERSION,
        "scorer_follows": lmms_eval.VERSION if scorer == "lmms_eval" else benchmark.ORIGINAL,
        "n": scored,
        "metrics": {name: float(estimate.value) for name, estimate in report.items()},
        "ci95": {name: estimate.half_width for name, estimate in report.items()},
        "counts": {name: estimate.n for name, estimate in report.items()},
        "intervals": "half of Wilson's interval, n over the design effect of questions that share an image; averages: "
        "half-widths added in squares; distribution: bootstrap over images",
        "asked": len(rows),
        "hidden_answers": len(rows) - scored,
        "unparsed": sum(row.parsed is None for row in rows),
        "skipped": {"count": len(skipped) + len(unasked), "first": [*skipped, *unasked][:_LISTED]},
        "skipped_as_wrong": len(unasked),
        "dataset": data.name,
        "data_path": data.path,
        "prompt": config.evaluate.prompt or benchmark.PROMPT[scorer],
        "imagine": config.evaluate.imagine,
        "latents": config.evaluate.latents if config.evaluate.imagine else None,
        **_spans(rows),
        "min_pixels": settings["min_pixels"],
        "max_pixels": settings["max_pixels"],
        "decoding": {
            "strategy": "greedy",
            "repetition_penalty": 1.0,
            "max_new_tokens": tokens,
        },
        "model": config.model.path or "tiny_vl",
        "backend": settings,
        "versions": provenance.versions(),
        "git_commit": provenance.git_commit(),
    }


def _spans(rows: Sequence[ScoredItem]) -> dict:
    """{"spans": shares of replies that opened no span of latents, and that did not close one}; {} without any."""
    counts = [row.spans for row in rows if row.spans]
    if not counts:
        return {}
    opened = sum(count for count, _ in counts)
    return {
        "spans": {
            "replies": len(counts),
            "opened": opened,
            "never_opened": sum(not count for count, _ in counts) / len(counts),
            "never_closed": sum(closed < count for count, closed in counts) / len(counts),
        }
    }


def throughput(directory: Path, count: int, seconds: float) -> dict | None:
    """Of this life of the run; where nothing was left to ask, what an earlier one measured."""
    if count:
        return {"items": count, "seconds": seconds, "items_per_second": count / seconds}
    try:
        return predictions.read_results(directory).get("throughput")
    except UserError:  # absent, or damaged: it is written anew
        return None


def table(found: dict, directory: Path) -> list[str]:
    """The metrics as lines of text."""
    title = f"{found['benchmark']} {found['split']}, {found['scorer']} scorer: {found['n']:,} questions"
    if not found["metrics"]:
        return [f"{title} could be scored, the answers are hidden; the replies are in {directory / PREDICTIONS}"]
    width = max(map(len, found["metrics"]))
    lines = [f"  {name:<{width}}  {value:6.2f} ± {found['ci95'][name]:.2f}" for name, value in found["metrics"].items()]
    if found["skipped"]["count"]:
        lines.append(
            f"  {found['skipped']['count']} questions could not be asked: {found['skipped_as_wrong']} of them count as "
            "wrong, the others have no question or answer to count"
        )
    if "spans" in found:
        spans = found["spans"]
        lines.append(
            f"  latents inside replies: {100 * spans['never_opened']:.1f} % of replies open no span, "
            f"{100 * spans['never_closed']:.1f} % leave one open"
        )
    return [title, *lines, f"{found['unparsed']} replies without an answer; {directory / RESULTS}"]
