"""MMVP (https://huggingface.co/datasets/MMVP/MMVP): Questions.csv and "MMVP Images", to one record a question."""

import csv
import io
import re
from collections.abc import Iterator
from typing import Any

from latent_jax.data.builders import parts
from latent_jax.data.builders.base import RawBuilder, each, record
from latent_jax.data.builders.files import read_image
from latent_jax.data.builders.parts import Part, Record
from latent_jax.data.builders.tally import Tally
from latent_jax.errors import UserError
from latent_jax.runtime.files import MOST_JSON, read_bytes

_COLUMNS = ("Index", "Question", "Options", "Correct Answer")


class Mmvp(RawBuilder):
    """One record a question; questions 2k-1 and 2k are a pair over two images that CLIP hardly tells apart."""

    name = "mmvp"
    NOUN = "question"
    PUBLISHED = {"test": 300}

    def find(self) -> dict[str, Any]:
        file = self.raw / "Questions.csv"
        if not file.is_file():
            raise UserError(f"{self.raw}: no Questions.csv here, expected an MMVP folder")
        return {"test": file}

    def parts(self, place: Any, tally: Tally) -> list[Part]:
        """Rows, some at a time: (index, question)."""
        try:
            text = read_bytes(place, MOST_JSON).decode("utf-8-sig")
            reader = csv.DictReader(io.StringIO(text, newline=""))
            rows, columns = list(reader), reader.fieldnames or []
        except (ValueError, csv.Error) as error:
            raise UserError(f"{place}: cannot be read as CSV ({error})") from None
        if missing := [column for column in _COLUMNS if column not in columns]:
            raise UserError(
                f"{place}: expected columns {', '.join(_COLUMNS)}, but {missing[0]!r} is not there: {columns}"
            )
        usable = []
        for number, row in enumerate(rows, 1):
            index, text, options, answer = ((row[column] or "").strip() for column in _COLUMNS)
            letters = re.findall(r"\(([a-z])\)", options)
            choices = [choice.strip() for choice in re.split(r"\([a-z]\)", options)[1:]]
            if not index.isdecimal() or len(index) > 9 or not text:
                reason = "no Index or no Question"
            elif letters != list("abcdefgh"[: len(letters)]) or len(letters) < 2 or not all(choices):
                reason = f'Options {options!r}, expected "(a) ... (b) ..."'
            elif answer not in [f"({letter})" for letter in letters]:
                reason = f"Correct Answer {answer!r} is not among {options!r}"
            else:
                question = {"id": index, "question": text, "options": options, "choices": choices, "answer": answer}
                usable.append((index, question))
                continue
            tally.see("question")
            tally.skip("question", f"{place}: row {number}: {reason}")
        ids = {int(index) for index, _ in usable}
        alone = sorted(index for index in ids if (index + 1 if index % 2 else index - 1) not in ids)
        if alone:
            tally.note(f"questions that have lost the other one of their pair: {', '.join(map(str, alone))}")
        return parts.chunks(usable, (place,))

    def examples(self, part: Part, tally: Tally) -> Iterator[Record]:
        def make(item: tuple[str, dict[str, Any]]) -> Record:
            index, question = item
            try:
                image = read_image(self.raw / "MMVP Images" / f"{index}.jpg")
                return record(index, images=[image], questions=[question])
            except ValueError as error:
                raise ValueError(f"question {index}: {error}") from None

        return each(part.place, "question", tally, make, lambda item: item[0])
