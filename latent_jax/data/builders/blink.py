"""BLINK (https://huggingface.co/datasets/BLINK-Benchmark/BLINK, SUB_TASK/val-*.parquet) to one record a question."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from latent_jax.benchmarks.blink import HIDDEN
from latent_jax.benchmarks.blink import TASKS as SUB_TASKS
from latent_jax.data.builders.base import RawBuilder, record
from latent_jax.data.builders.files import are_texts, check_image, inside, is_text, read_image
from latent_jax.data.builders.parquet import PARQUET_ERRORS
from latent_jax.data.builders.parts import Part, Record
from latent_jax.data.builders.tally import Tally
from latent_jax.errors import UserError, one_line

_COLUMNS = ("idx", "question", "sub_task", "image_1", "choices", "answer")
_IMAGES = ("image_1", "image_2", "image_3", "image_4")
_SPLITS = {"val": "validation", "test": "test", "train": "train"}


class Blink(RawBuilder):
    """One record a question with one to four images; its group is the sub-task. Test answers are "hidden"."""

    name = "blink"
    NOUN = "question"
    PUBLISHED = {"validation": 1901, "test": 1906}

    def find(self) -> dict[str, Any]:
        """Split -> its parquet files, by sub-task."""
        found: dict[str, list[Path]] = {}
        for file in sorted(self.raw.rglob("*.parquet")):
            split = _SPLITS.get(file.name.split("-")[0].split(".")[0])
            if split:
                found.setdefault(split, []).append(file)
        if not found:
            raise UserError(f"{self.raw}: no SUB_TASK/val-*.parquet here, expected BLINK's parquet files")
        return found

    def parts(self, place: Any, tally: Tally) -> list[Part]:
        """A part is a file; all are opened here, so that a broken download is known before anything is written."""
        listed = []
        for file in place:
            metadata = _open(file).metadata
            listed.append(Part(file, (file,), f"{file.parent.name}/{file.name}", metadata.num_rows))
        return listed

    def examples(self, part: Part, tally: Tally) -> Iterator[Record]:
        file = part.place
        table = _open(file)
        columns = [name for name in table.schema_arrow.names if name in (*_COLUMNS, *_IMAGES, "prompt", "explanation")]
        for group in range(table.num_row_groups):
            rows = table.metadata.row_group(group).num_rows
            tally.see("question", rows)
            try:
                entries = table.read_row_group(group, columns=columns).to_pylist()
            except PARQUET_ERRORS as error:
                reason = f"{file}: row group {group} with {rows} rows cannot be read ({_line(error)})"
                tally.skip("question", reason, rows)
                continue
            for number, entry in enumerate(entries):
                try:
                    made = _record(entry, file)
                except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
                    place = f"question {entry['idx']}" if entry["idx"] else f"row {number} of row group {group}"
                    tally.skip("question", f"{file}: {place}: {error}")
                else:
                    yield made


def _open(file: Path) -> pq.ParquetFile:
    if not file.is_file():
        raise UserError(f"{file}: not a regular file")
    try:
        table = pq.ParquetFile(file)
    except PARQUET_ERRORS as error:
        raise UserError(f"{file}: not a whole parquet file, download it again ({_line(error)})") from None
    names = table.schema_arrow.names
    if missing := [name for name in _COLUMNS if name not in names]:
        raise UserError(
            f"{file}: expected BLINK's columns {', '.join(_COLUMNS)}, but {missing[0]!r} is not there; "
            f"it has {', '.join(names)}"
        )
    return table


def _record(entry: dict[str, Any], file: Path) -> Record:
    if not is_text(entry["idx"]) or not is_text(entry["question"]):
        raise ValueError("no idx or no question")
    if entry["sub_task"] not in SUB_TASKS:
        raise ValueError(f"sub_task {entry['sub_task']!r}, expected one of {', '.join(SUB_TASKS)}")
    choices, answer = entry["choices"], entry["answer"]
    if not are_texts(choices):
        raise ValueError(f"choices {str(choices)[:40]}, expected a list of texts")
    if answer not in [f"({letter})" for letter in "ABCDEFGH"[: len(choices)]] and answer != HIDDEN:
        raise ValueError(f"answer {answer!r} is not among its {len(choices)} choices")
    cells = [(name, entry.get(name)) for name in _IMAGES]
    images = [_image(cell, name, file) for name, cell in cells if cell is not None]
    if cells[0][1] is None:
        raise ValueError("no image_1")
    question = {key: value for key, value in entry.items() if key not in _IMAGES and key != "idx"}
    question = {"id": entry["idx"], "prompt": "", **question}
    return record(entry["idx"], images=images, questions=[question], group=entry["sub_task"])


def _image(cell: Any, name: str, file: Path) -> bytes:
    """A cell is {"bytes", "path"}; either may be missing."""
    if not isinstance(cell, dict):
        raise ValueError(f"{name} is a {type(cell).__name__}, expected its bytes and path")
    data = cell.get("bytes")
    if data is None:
        try:
            path = inside(file.parent, cell.get("path"))
        except ValueError as error:
            raise ValueError(f"{name} has no bytes, and its path {error}") from None
        if not os.path.isfile(path):
            raise ValueError(f"{name} has no bytes, and {path} is no file")
        return read_image(path)
    if not isinstance(data, bytes):
        raise ValueError(f"{name} has a {type(data).__name__} as its bytes")
    return check_image(data, name)


def _line(error: BaseException) -> str:
    return one_line(error)[:200] or type(error).__name__
