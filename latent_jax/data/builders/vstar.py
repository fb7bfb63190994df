"""V* Bench (https://huggingface.co/datasets/craigwu/vstar_bench) to one record a question.

The published folder holds direct_attributes/ and relative_position/, each with NAME.jpg and NAME.json, and
test_questions.jsonl with the same questions written out as multiple choice. The JSON files list the right option first:
where the JSONL is missing, the options are put into an order drawn from the question's name.
"""

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latent_jax.data.builders import parts
from latent_jax.data.builders.base import RawBuilder, each, record
from latent_jax.data.builders.files import (
    are_texts,
    first_there,
    inside,
    is_text,
    read_image,
    read_json,
    read_json_lines,
)
from latent_jax.data.builders.parts import Part, Record
from latent_jax.data.builders.tally import Tally
from latent_jax.errors import UserError

CATEGORIES = ("direct_attributes", "relative_position")
_OPTION = re.compile(r"^\(([A-Z])\)\s*(.+?)\s*$", re.MULTILINE)
_IMAGES = (".jpg", ".jpeg", ".png")
_Listed = tuple[dict[str, Any] | str, Path | None]  # (question, image file), or (the fault, None)


class VStar(RawBuilder):
    """One record a question: `choices` without their letters, `answer` a letter, `category`, the published `text`."""

    name = "vstar"
    NOUN = "question"
    PUBLISHED = {"test": 191}

    def find(self) -> dict[str, Any]:
        file = self.raw / "test_questions.jsonl"
        if not file.exists() and not any((self.raw / category).is_dir() for category in CATEGORIES):
            raise UserError(f"{self.raw}: neither test_questions.jsonl nor {' nor '.join(CATEGORIES)} here")
        return {"test": file}

    def parts(self, place: Any, tally: Tally) -> list[Part]:
        """Questions, some at a time: (question, image file)."""
        if not place.exists():
            files = [self.raw / category for category in CATEGORIES if (self.raw / category).is_dir()]
            listed = [file for folder in files for file in sorted(folder.glob("*.json"))]
            return parts.chunks([self._from_json(file) for file in listed], tuple(listed))
        questions = [self._from_line(number, entry) for number, entry in read_json_lines(place, "question", tally)]
        return parts.chunks(questions, (place,))

    def examples(self, part: Part, tally: Tally) -> Iterator[Record]:
        def make(item: _Listed) -> Record:
            question, image = item
            if isinstance(question, str) or image is None:
                raise ValueError(question)
            try:
                return record(question["id"], images=[read_image(image)], questions=[question])
            except ValueError as error:
                raise ValueError(f"question {question['id']}: {error}") from None

        return each(part.place, "question", tally, make)

    def _from_line(self, number: int, entry: dict[str, Any]) -> _Listed:
        name = f"test_questions.jsonl: line {number}"
        text, image, label = (entry.get(field) for field in ("text", "image", "label"))
        if not is_text(text) or not is_text(image):
            return f"{name}: expected text, image, label, category and question_id, got {', '.join(entry)}", None
        try:
            file = inside(self.raw, image)
        except ValueError as error:
            return f"{name}: image {error}", None
        options = list(_OPTION.finditer(text))
        letters = [option[1] for option in options]
        if letters != list("ABCDEFGH"[: len(letters)]) or len(letters) < 2:
            return f"{name}: text has no options (A) ..., (B) ...: {text[:60]!r}", None
        if label not in letters:
            return f"{name}: label {label!r} is not among the options {', '.join(letters)}", None
        question = {
            "id": str(entry.get("question_id", image)),
            "question": text[: options[0].start()].strip(),
            "choices": [option[2] for option in options],
            "answer": label,
            "category": str(entry.get("category", image.split("/")[0])),
            "text": text,
        }
        return {**question, **_annotation(file.with_suffix(".json"))}, file

    def _from_json(self, file: Path) -> _Listed:
        name = f"{file.parent.name}/{file.stem}"
        try:
            entry = read_json(file, dict, '{"question", "options", ...}')
        except UserError as error:
            return str(error), None
        options = entry.get("options")
        if not is_text(entry.get("question")) or not are_texts(options) or not 2 <= len(options) <= 8:
            return f"{file}: expected a question and its options, got {', '.join(entry)}", None
        order = random.Random(name).sample(range(len(options)), len(options))
        question = {
            "id": name,
            "question": entry["question"],
            "choices": [options[i] for i in order],
            "answer": "ABCDEFGH"[order.index(0)],
            "category": file.parent.name,
        }
        images = [file.with_suffix(suffix) for suffix in _IMAGES]
        return {**question, **_annotation(file)}, first_there(images)


def _annotation(file: Path) -> dict[str, Any]:
    """What the question is about and where that is in the image (x, y, w, h), where the file says so."""
    try:
        entry = read_json(file, dict, "")
    except UserError:
        return {}
    return {field: entry[field] for field in ("target_object", "bbox") if field in entry}
