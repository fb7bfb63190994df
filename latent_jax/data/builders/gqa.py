"""GQA (https://cs.stanford.edu/people/dorarad/gqa/download.html) to one record an image with all its questions."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds

from latent_jax.data.builders.base import RawBuilder
from latent_jax.data.builders.files import read_image, read_json, split_name
from latent_jax.data.builders.tally import Tally
from latent_jax.errors import UserError

_SHAPE = '{question id: {"imageId", "question", "answer", ...}}'
_SUFFIX = "_balanced_questions"


def find(raw: Path) -> dict[str, Path]:
    """TFDS split -> its file of balanced questions, in questions/, questions1.2/ or the folder itself."""
    found = {}
    for file in sorted([*raw.glob(f"questions*/*{_SUFFIX}.json"), *raw.glob(f"*{_SUFFIX}.json")]):
        split = split_name(file.stem.removesuffix(_SUFFIX))
        if split in found:
            raise UserError(f"{file}: {found[split]} is also there and both are {split}; keep one of them")
        found[split] = file
    if not found:
        raise UserError(f"{raw}: no questions/*{_SUFFIX}.json here, expected a GQA folder")
    return found


def examples(raw: Path, file: Path, tally: Tally) -> Iterator[tuple[str, dict]]:
    """(image id, features) of every image with a usable file and a usable question, in the file's order."""
    questions = _questions(file, tally)
    graphs = _scene_graphs(raw, file.stem.removesuffix(_SUFFIX))
    for image_id, its in questions.items():
        tally.see("image")
        try:
            data = read_image(_locate(raw, image_id))
        except ValueError as error:
            tally.skip("image", str(error))
            continue
        graph = json.dumps(graphs[image_id]) if image_id in graphs else ""
        yield image_id, {"image_id": image_id, "image": io.BytesIO(data), "questions": its, "scene_graph": graph}


def _questions(file, tally):
    """Image id -> its questions (JSON texts) in the file's order."""
    content = read_json(file, dict, _SHAPE)
    if not content:
        raise UserError(f"{file}: expected {_SHAPE}, but it is empty")
    images = {}
    for question_id, question in content.items():
        tally.see("question")
        if not isinstance(question, dict) or not isinstance(question.get("imageId"), str):
            tally.skip("question", f"{file}: question {question_id} has no imageId")
        elif not isinstance(question.get("question"), str) or not question["question"].strip():
            tally.skip("question", f"{file}: question {question_id} has no text")
        elif not isinstance(question.get("answer", ""), str):
            tally.skip("question", f"{file}: question {question_id} has an answer that is not text")
        else:
            record = json.dumps({"id": question_id, "answer": "", **question})
            images.setdefault(question["imageId"], []).append(record)
    return images


def _scene_graphs(raw, official):
    """Image id -> scene graph; GQA publishes them for train and val only."""
    for file in (raw / "sceneGraphs" / f"{official}_sceneGraphs.json", raw / f"{official}_sceneGraphs.json"):
        if file.exists():
            return read_json(file, dict, '{image id: {"width", "height", "objects"}}')
    return {}


def _locate(raw, image_id):
    places = [raw / "images" / f"{image_id}{suffix}" for suffix in (".jpg", ".png")]
    return next((place for place in places if place.exists()), places[0])


class Gqa(RawBuilder, skip_registration=True):
    """One record an image: `image_id`, `image` (encoded), `questions` and `scene_graph` (JSON, "" where there is none).

    A question is the JSON of its official record with its `id`; where the file has no answer it is "".
    """

    name = "gqa"
    VERSION = tfds.core.Version("1.0.0")
    FEATURES = tfds.features.FeaturesDict(
        {
            "image_id": tfds.features.Text(),
            "image": tfds.features.Image(),
            "questions": tfds.features.Sequence(tfds.features.Text()),
            "scene_graph": tfds.features.Text(),
        }
    )

    def find(self):
        return find(self.raw)

    def examples(self, place, tally):
        return examples(self.raw, place, tally)
