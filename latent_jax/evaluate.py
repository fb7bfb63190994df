"""An evaluation, one story: the questions, the model, its replies, and their scores."""

import dataclasses
import functools
import importlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from latent_jax.benchmarks.items import Item, ScoredItem, conversation
from latent_jax.config.evaluation import Evaluation
from latent_jax.data import sources
from latent_jax.errors import Stopped
from latent_jax.evaluation import answering, begun, predictions, questions, results
from latent_jax.evaluation.predictions import PREDICTIONS, RESULTS, Scoring
from latent_jax.runtime import files, lock, preemption
from latent_jax.runtime.progress import Progress


@dataclasses.dataclass(frozen=True)
class Backend:
    """What answers: ours, or a stock model of another library (third_party/).

    answer: (conversations in HF chat format, most new tokens) -> the replies in their order, special tokens skipped,
      greedily decoded. settings: JSON-able, what a results file says about it; must hold `min_pixels`, `max_pixels`.
    vlm: the facade, where it is ours: what interventions on latents ask.
    """

    answer: Callable[[Sequence[list[dict]], int], list[str]]
    settings: dict[str, Any]
    vlm: Any = None


def run(config: Evaluation, directory: str | Path, open_backend: Callable[[Evaluation], Backend] | None = None) -> dict:
    """Evaluates what the config describes and leaves predictions.jsonl and results.json in `directory`.

    Resumes what lies there: no question is asked or scored twice. open_backend: config -> Backend; None = ours.
    Returns what results.json holds. Raises UserError for bad input.
    """
    config, settled = answering.settled(config, Path(directory), open_backend is not None)
    with lock.only_writer(directory):
        return _run(config, Path(directory), open_backend, settled)


def _run(
    config: Evaluation, directory: Path, open_backend: Callable[[Evaluation], Backend] | None, settled: list[str]
) -> dict:
    benchmark = importlib.import_module(f"latent_jax.benchmarks.{config.benchmark}")
    scoring = Scoring(benchmark, config.evaluate.scorer, config.evaluate.prompt)

    # ------------------------------------------------------------ which questions
    data = questions.open_data(config, benchmark)
    items, skipped = questions.read_items(data, benchmark, config)
    extras = questions.read_choices(config, benchmark, items)
    everything, items = items, items[: config.evaluate.examples or None]
    kept, told = begun.read(config, directory)
    rows = predictions.resume(directory / PREDICTIONS, items, scoring)
    left = [item for item in items if item.id not in rows]
    tokens = config.evaluate.max_new_tokens or answering.most_tokens(benchmark, config.evaluate.scorer)
    now = {"max_new_tokens": tokens, "data": sources.fingerprint(data.name, data.path, data.split)}
    begun.check(config, directory, kept, now, len(rows), bool(left))
    before = answering.stamp(config.model.path)
    weights, said = answering.known(config.model.path, directory, kept, bool(left))
    settings, where = kept and kept["backend"], f"{data.name} {data.split}"

    with (
        Progress(len(items), len(rows), config.log.progress, unit="question") as progress,
        preemption.watch("stopping after this batch") as stopped,
    ):
        for note in [
            *questions.notes(config, benchmark, data, items, skipped, len(rows)),
            *said,
            *([*settled, *told] if left else []),
        ]:
            progress.say(note)

        # -------------------------------------------------------- asked of what
        backend = None
        if left or settings is None:
            backend = (open_backend or load_ours)(config)
            answering.check_unchanged(config.model.path, before)
            begun.write(config, directory, backend.settings, kept, {"weights": weights, **now})
            settings = backend.settings

        # -------------------------------------------------------- what it replied
        started = time.monotonic()
        if left and backend:
            imagine = bool(config.evaluate.imagine) and getattr(backend.vlm, "thinks", True)
            show = functools.partial(conversations, source=data.source, scoring=scoring, imagine=imagine)
            answer = backend.answer
            send = lambda items: answer(show(items), tokens)  # noqa: E731
            if config.evaluate.latents != "own":
                send = _interventions().sender(config, backend.vlm, everything, show, tokens)
            with predictions.Writer(directory / PREDICTIONS, scoring) as writer:
                for batch in ask(left, send, scoring, config.evaluate.batch_size):
                    answering.too_many(config, where, [*rows.values(), *batch], len(skipped), len(items) + len(skipped))
                    writer.write(batch)
                    rows |= {row.item.id: row for row in batch}
                    for row in batch:
                        if row.skipped:
                            progress.say(f"skipped, counted as wrong: question {row.item.id}: {row.skipped}")
                    progress.update(len(rows), _summary(rows, len(items) - len(left), started))
                    if stopped() and len(rows) < len(items):
                        progress.say(
                            f"stopped after {len(rows):,} of {len(items):,} questions; the same command goes on from "
                            "there"
                        )
                        raise Stopped(stopped.number)
        seconds = time.monotonic() - started
        if left:
            speed = len(left) / seconds
            progress.say(f"{len(left):,} questions in {seconds:.1f} s: {speed:.2f} items/s, without loading the model")

    # ------------------------------------------------------------ how that scores
    whole = [rows[item.id] for item in items]
    scored = [row for row in whole if row.correct is not None]
    report = benchmark.report(scored, config.evaluate.scorer, config.seed, **extras) if scored else {}
    found = results.collect(config, benchmark, data, settings, whole, report, skipped, tokens)
    found |= {"weights": weights, "predictions": predictions.digest(directory / PREDICTIONS)}
    found["throughput"] = results.throughput(directory, len(left), seconds)
    found = predictions.sealed(found)
    if hasattr(benchmark, "submission"):
        name, content = benchmark.submission(whole)
        files.write_text(directory / name, json.dumps(content) + "\n")
    files.write_text(directory / RESULTS, json.dumps(found, indent=2) + "\n")
    print("\n".join(results.table(found, directory)))
    if line := predictions.strange(found, scored):
        progress.say(line)
    if config.evaluate.interventions:
        vlm, interventions = (open_backend or load_ours)(config).vlm, _interventions()
        shown = conversations(interventions.spread(items), data.source, scoring, vlm.thinks)
        latents = interventions.geometry(vlm, shown, tokens)
        interventions.run(config, directory, latents, functools.partial(run, open_backend=open_backend))
    return found


# ---------------------------------------------------------------- replies


def load_ours(config: Evaluation) -> Backend:
    """The model of `config.model.path` behind the facade, with the config's pixel limits."""
    vlm = _load(config.model.path, None if config.model.dtype == "auto" else config.model.dtype)
    if config.evaluate.imagine and not (vlm.thinks or vlm.writes):
        raise answering.no_head(vlm.name)
    limits = {key: value for key in ("min_pixels", "max_pixels") if (value := getattr(config.data, key))}
    processor = dataclasses.replace(vlm.processor, image=dataclasses.replace(vlm.processor.image, **limits))
    vlm = dataclasses.replace(vlm, processor=processor)
    settings = {
        "name": "latent_jax",
        "dtype": str(vlm.model.vlm.text.embed[...].dtype),
        "min_pixels": processor.image.min_pixels,
        "max_pixels": processor.image.max_pixels,
    }

    def answer(conversations: Sequence[list[dict]], tokens: int) -> list[str]:
        shut = None if config.evaluate.imagine else [()] * len(conversations)
        return answering.replies(vlm, conversations, tokens, spans=shut, seed=config.seed)

    return Backend(answer, settings, vlm)


@functools.lru_cache(maxsize=1)
def _load(path: str, dtype: str | None) -> Any:
    """Kept, since an evaluation with interventions asks the same model many times."""
    import jax

    import latent_jax
    from latent_jax.runtime.devices import enable_compile_cache, keep_freed_memory

    enable_compile_cache()
    if jax.default_backend() == "cpu":
        keep_freed_memory()
    return latent_jax.load(path, dtype=dtype)


def _interventions() -> ModuleType:
    """Only where they are asked for: they need numpy's and the geometry's modules, which no backend does."""
    return importlib.import_module("latent_jax.analysis.interventions")


def ask(items: Sequence[Item], send: answering.Send, scoring: Scoring, batch_size: int) -> Iterator[list[ScoredItem]]:
    """Batches of judged rows, in order. send: items -> their replies."""
    remaining = iter(items)
    while batch := list(itertools.islice(remaining, batch_size)):
        yield answering.each(batch, send, scoring)


def conversations(items: Sequence[Item], source: Sequence[dict], scoring: Scoring, imagine: bool) -> list[list[dict]]:
    """The conversation to send for every item."""
    found, record = [], -1
    images: list[bytes] = []
    for item in items:
        if record != item.record:  # questions about one image follow each other
            record, images = item.record, source[item.record]["images"]
        found.append(conversation(scoring.prompt(item), images, imagine))
    return found


def _summary(rows: dict[str, ScoredItem], before: int, started: float) -> dict:
    judged = [row.correct for row in rows.values() if row.correct is not None]
    correct = {"correct": 100 * sum(judged) / len(judged)} if judged else {}
    return {"items_per_second": (len(rows) - before) / max(1e-9, time.monotonic() - started), **correct}
