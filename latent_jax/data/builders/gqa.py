"""GQA (https://cs.stanford.edu/people/dorarad/gqa/download.html) to one record an image with all its questions."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latent_jax.data.builders import parts
from latent_jax.data.builders.base import RawBuilder, each, record
from latent_jax.data.builders.files import (
    as_json,
    first_there,
    inside,
    is_text,
    read_entries,
    read_image,
    read_json,
    split_name,
)
from latent_jax.data.builders.parts import Part, Record
from latent_jax.data.builders.tally import Tally
from latent_jax.errors import UserError

_SHAPE = '{question id: {"imageId", "question", "answer", ...}}'
_SUFFIX = "_balanced_questions"


class Gqa(RawBuilder):
    """One record an image: `key` is imageId, each question its official record with `id`.

    A hidden answer is "". `scene_graph` where the file has one; `choices` of a question ({"valid", "plausible"}) where
    that file is there.
    """

    name = "gqa"
    PUBLISHED = {"testdev": 398}

    def find(self) -> dict[str, Any]:
        """Split -> its file of balanced questions, in questions/, questions1.2/ or the folder itself."""
        found: dict[str, Path] = {}
        for file in sorted([*self.raw.glob(f"questions*/*{_SUFFIX}.json"), *self.raw.glob(f"*{_SUFFIX}.json")]):
            split = split_name(file.stem.removesuffix(_SUFFIX))
            if split in found:
                raise UserError(f"{file}: {found[split]} is also there and both are {split}; keep one of them")
            found[split] = file
        if not found:
            raise UserError(f"{self.raw}: no questions/*{_SUFFIX}.json here, expected a GQA folder")
        return found

    def parts(self, place: Any, tally: Tally) -> list[Part]:
        """Images, some at a time: (image id, questions as JSON texts, scene graph or None)."""
        official = place.stem.removesuffix(_SUFFIX)
        files = [self._beside(official, "sceneGraphs"), self._beside(official, "choices", folder="eval")]
        shapes = '{image id: {"width", "height", "objects"}}', '{question id: {"valid", "plausible"}}'
        graphs, choices = (read_json(file, dict, shape) if file else {} for file, shape in zip(files, shapes))
        questions = _questions(place, choices, tally)
        images = [(image_id, its, graphs.get(image_id)) for image_id, its in questions.items()]
        return parts.chunks(images, (place, *filter(None, files)))

    def _beside(self, official: str, kind: str, folder: str | None = None) -> Path | None:
        """A file that is published for some splits only, or None."""
        name = f"{official}_{kind}.json"
        places = self.raw / (folder or kind) / name, self.raw / name
        return next((file for file in places if file.exists()), None)

    def examples(self, part: Part, tally: Tally) -> Iterator[Record]:
        def make(item: tuple[str, list[str], Any]) -> Record:
            image_id, questions, graph = item
            extra = {"scene_graph": graph} if graph is not None else {}
            try:
                file = _locate(self.raw, image_id)
            except ValueError as error:
                raise ValueError(f"imageId {error}") from None
            return record(image_id, images=[read_image(file)], questions=questions, **extra)

        return each(part.place, "image", tally, make, lambda item: item[0])


def _questions(file: Path, choices: dict[str, Any], tally: Tally) -> dict[str, list[str]]:
    """Image id -> its questions in the file's order, as JSON texts: as objects a million would burden the collector."""
    images: dict[str, list[str]] = {}
    for question_id, question in read_entries(file, _SHAPE, "question", tally).items():
        tally.see("question")
        if not isinstance(question, dict) or not isinstance(question.get("imageId"), str):
            tally.skip("question", f"{file}: question {question_id} has no imageId")
        elif not is_text(question.get("question")):
            tally.skip("question", f"{file}: question {question_id} has no text")
        elif not isinstance(question.get("answer", ""), str):
            tally.skip("question", f"{file}: question {question_id} has an answer that is not text")
        else:
            extra = {"choices": choices[question_id]} if question_id in choices else {}
            try:
                text = as_json({"id": question_id, "answer": "", **question, **extra})
            except ValueError as error:
                tally.skip("question", f"{file}: question {question_id}: {error}")
                continue
            images.setdefault(question["imageId"], []).append(text)
    return images


def _locate(raw: Path, image_id: str) -> Path:
    return first_there([inside(raw / "images", f"{image_id}{suffix}") for suffix in (".jpg", ".png")])
