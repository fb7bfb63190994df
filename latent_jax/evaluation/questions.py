"""The questions of an evaluation: the split that is asked, and the items of it that can be."""

import dataclasses
from collections.abc import Iterator, Sequence
from types import ModuleType

from latent_jax.benchmarks.items import Item
from latent_jax.config.evaluation import Evaluation
from latent_jax.data import sources
from latent_jax.errors import UserError, one_line
from latent_jax.evaluation.predictions import RESULTS
from latent_jax.runtime import files

_TOLD = 5  # skipped questions that are named one by one; results.json has more
_LONGEST = 300  # characters of a line about one question


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


def _shown(name: object) -> str:
    return name[:_LONGEST] if isinstance(name, str) and name.isprintable() else ascii(name)[:_LONGEST]
