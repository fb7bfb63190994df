"""An evaluation, one story: the questions, the model, its replies, and their scores."""

import dataclasses
import functools
import importlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from latent_jax.benchmarks import VERSION, lmms_eval
from latent_jax.benchmarks.estimates import Estimate
from latent_jax.benchmarks.items import Item, ScoredItem, conversation
from latent_jax.config.evaluation import Evaluation
from latent_jax.data import sources
from latent_jax.errors import Stopped, UserError, one_line
from latent_jax.evaluation import answering, begun, predictions
from latent_jax.evaluation.predictions import PREDICTIONS, RESULTS, Scoring
from latent_jax.runtime import files, lock, preemption, provenance
from latent_jax.runtime.progress import Progress

_TOLD = 5  # skipped questions that are told of one by one; results.json has more
_LISTED = 100
_LONGEST = 300  # characters of what is said of one question


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
    data = open_data(config, benchmark)
    items, skipped = read_items(data, benchmark, config)
    extras = read_choices(config, benchmark, items)
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
            *notes(config, benchmark, data, items, skipped, len(rows)),
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
    found = results(config, benchmark, data, settings, whole, report, skipped, tokens)
    found |= {"weights": weights, "predictions": predictions.digest(directory / PREDICTIONS)}
    found["throughput"] = _throughput(directory, len(left), seconds)
    found = predictions.sealed(found)
    if hasattr(benchmark, "submission"):
        name, content = benchmark.submission(whole)
        files.write_text(directory / name, json.dumps(content) + "\n")
    files.write_text(directory / RESULTS, json.dumps(found, indent=2) + "\n")
    print("\n".join(table(found, directory)))
    if line := predictions.strange(found, scored):
        progress.say(line)
    if config.evaluate.interventions:
        vlm, interventions = (open_backend or load_ours)(config).vlm, _interventions()
        shown = conversations(interventions.spread(items), data.source, scoring, vlm.thinks)
        latents = interventions.geometry(vlm, shown, tokens)
        interventions.run(config, directory, latents, functools.partial(run, open_backend=open_backend))
    return found


# ---------------------------------------------------------------- questions


@dataclasses.dataclass(frozen=True)
class Asked:
    """A split of a prepared dataset."""

    name: str
    path: str
    split: str
    source: Sequence[dict]


def open_data(config: Evaluation, benchmark: ModuleType) -> Asked:
    """The benchmark's own dataset, or of the embedded world; the split that is usually evaluated, if none is named."""
    path, name = config.data.path, config.data.name
    name = name or (config.benchmark if path or not benchmark.EMBEDDED else benchmark.EMBEDDED)
    split = config.data.split
    if not split:
        there = sources.split_names(name, path)
        usual = [known for known in benchmark.SPLITS if known in there] or (there if len(there) == 1 else [])
        if not usual:
            raise UserError(f"config.data.split: {name} has {', '.join(there)}; say which one is evaluated")
        split = usual[0]
    return Asked(name, path, split, sources.open_source(name, path, split))


def read_items(data: Asked, benchmark: ModuleType, config: Evaluation) -> tuple[list[Item], list[str]]:
    """The questions in the files' order, and a line for each one that cannot be asked.

    Raises UserError where the share of these is above `config.data.max_bad`.
    """
    items, skipped, seen = [], [], set()
    for place, record in enumerate(data.source):
        for question in record["questions"]:
            question = question if isinstance(question, dict) else {}
            name = question.get("id")
            where = f"{data.name} {data.split}, record {_shown(record['key'])}, question {_shown(name)}"
            try:
                if not isinstance(name, str) or not name:
                    raise ValueError("has no id")
                name.encode()  # half a character cannot stand in a file of predictions
                if name in seen:
                    raise ValueError("has the id of an earlier question")
                benchmark.check(question, len(record["images"]))
            except UnicodeEncodeError:
                skipped.append(f"{where}: its id holds half a character")
                continue
            except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as problem:
                skipped.append(f"{where}: {one_line(problem)[:_LONGEST] or type(problem).__name__}")
                continue
            seen.add(name)
            cluster = benchmark.cluster(question, record["key"])
            items.append(Item(name, question, place, len(record["images"]), cluster))
    count = len(items) + len(skipped)
    if not count:
        raise UserError(f"{data.name} {data.split}: holds no question; expected {config.benchmark}'s")
    if len(skipped) > config.data.max_bad * count:
        raise UserError(
            f"{skipped[0]}; so {len(skipped)} of {count} questions, more than config.data.max_bad = "
            f"{config.data.max_bad}: expected {config.benchmark} in its official form, is this another version?"
        )
    return items, skipped


def read_choices(config: Evaluation, benchmark: ModuleType, items: Sequence[Item]) -> dict:
    """{"choices": content} of the choices file, {} without one."""
    path = config.evaluate.choices
    if not path:
        return {}
    try:
        content = files.read_json(path, dict, "GQA's choices", most=None)
        benchmark.check_choices(content, {item.id: item.question for item in items})
    except UserError as problem:
        raise UserError(f"config.evaluate.choices: {problem}") from None
    except ValueError as problem:
        raise UserError(f"config.evaluate.choices: {path}: {problem}") from None
    return {"choices": content}


def notes(
    config: Evaluation, benchmark: ModuleType, data: Asked, items: Sequence[Item], skipped: Sequence[str], done: int
) -> Iterator[str]:
    """Lines to print before the first question."""
    yield f"{config.benchmark}: {len(items):,} questions of {data.name} {data.split}, scorer {config.evaluate.scorer}"
    for line in skipped[:_TOLD]:
        yield f"skipped: {line}"
    if skipped:
        yield f"skipped {len(skipped)} of {len(items) + len(skipped)} questions; they are listed in {RESULTS}"
    published = benchmark.PUBLISHED.get(data.split)
    if published and not config.evaluate.examples and len(items) != published and data.name == config.benchmark:
        yield f"{config.benchmark} {data.split} has {published:,} questions as published, here are {len(items):,}"
    hidden = sum(benchmark.answer(item.question) is None for item in items)
    if hidden:
        yield f"{hidden:,} of {len(items):,} answers are hidden: those replies are kept and not scored"
    if done:
        yield f"resuming after {done:,} questions"


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
        shut = [()] * len(conversations) if vlm.writes and not config.evaluate.imagine else None
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


# ---------------------------------------------------------------- scores


def results(
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


def _throughput(directory: Path, count: int, seconds: float) -> dict | None:
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


def _shown(name: object) -> str:
    return name[:_LONGEST] if isinstance(name, str) and name.isprintable() else ascii(name)[:_LONGEST]
