"""COCO captions (https://cocodataset.org/#format-data, "Image Captioning") to one record an image."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from latent_jax.data.builders.base import RawBuilder
from latent_jax.data.builders.files import read_image, read_json, split_name
from latent_jax.data.builders.tally import Tally
from latent_jax.errors import UserError

_SHAPE = '{"images": [{"id", "file_name"}, ...], "annotations": [{"id", "image_id", "caption"}, ...]}'


def find(raw: Path) -> dict[str, tuple[Path, str]]:
    """TFDS split -> (captions file, official split name) in a COCO folder."""
    found = {}
    for file in sorted(raw.glob("annotations/captions_*.json")):
        official = file.stem.removeprefix("captions_")
        split = split_name(official)
        if split in found:
            raise UserError(f"{file}: {found[split][0].name} is also there and both are {split}; keep one of them")
        found[split] = file, official
    if not found:
        raise UserError(f"{raw}: no annotations/captions_*.json here, expected a COCO folder")
    return found


def examples(raw: Path, file: Path, official: str, tally: Tally) -> Iterator[tuple[int, dict]]:
    """(image id, features) of every image with a usable file and a usable caption, in the file's order."""
    content = read_json(file, dict, _SHAPE)
    captions = _captions(file, content, tally)
    ids = set()
    for image in _list(file, content, "images"):
        tally.see("image")
        if not isinstance(image, dict) or not isinstance(image.get("id"), int) or not image.get("file_name"):
            tally.skip("image", f"{file}: an image without an integer id or a file_name: {str(image)[:80]}")
            continue
        image_id = image["id"]
        if image_id in ids:
            tally.skip("image", f"{file}: image id {image_id} comes twice")
            continue
        ids.add(image_id)
        if image_id not in captions:
            tally.skip("image", f"{file}: image {image_id} has no usable caption")
            continue
        try:
            data = read_image(_locate(raw, official, image["file_name"]))
        except ValueError as error:
            tally.skip("image", str(error))
            continue
        yield (
            image_id,
            {
                "image_id": image_id,
                "file_name": image["file_name"],
                "image": io.BytesIO(data),
                "captions": captions[image_id],
            },
        )
    for image_id in captions.keys() - ids:
        tally.skip("caption", f"{file}: a caption of image {image_id}, which is not among the images")


def _captions(file, content, tally):
    """Image id -> captions in the file's order."""
    captions, ids = {}, set()
    for annotation in _list(file, content, "annotations"):
        tally.see("caption")
        annotation_id = annotation.get("id") if isinstance(annotation, dict) else None
        text = annotation.get("caption") if isinstance(annotation, dict) else None
        if not isinstance(text, str) or not isinstance(annotation.get("image_id"), int) or annotation_id is None:
            tally.skip("caption", f"{file}: an annotation without id, image_id or caption: {str(annotation)[:80]}")
        elif not text.strip():
            tally.skip("caption", f"{file}: annotation {annotation_id} has an empty caption")
        elif annotation_id in ids:
            tally.skip("caption", f"{file}: annotation id {annotation_id} comes twice")
        else:
            captions.setdefault(annotation["image_id"], []).append(text.strip())
        ids.add(annotation_id)
    return captions


def _list(file, content, key):
    if not isinstance(content.get(key), list) or not content[key]:
        got = "missing" if key not in content else "empty" if content[key] == [] else f"a {type(content[key]).__name__}"
        raise UserError(f"{file}: expected {_SHAPE}, but {key!r} is {got}")
    return content[key]


def _locate(raw, official, file_name):
    """In the split's folder, or under images/ as some mirrors have it."""
    places = [raw / official / file_name, raw / "images" / official / file_name, raw / "images" / file_name]
    return next((place for place in places if place.exists()), places[0])


class CocoCaptions(RawBuilder, skip_registration=True):
    """One record an image: `image_id`, `file_name`, `image` (encoded, as it was) and `captions` in the file's order."""

    name = "coco_captions"
    VERSION = tfds.core.Version("1.0.0")
    FEATURES = tfds.features.FeaturesDict(
        {
            "image_id": tfds.features.Scalar(np.int64),
            "file_name": tfds.features.Text(),
            "image": tfds.features.Image(),
            "captions": tfds.features.Sequence(tfds.features.Text()),
        }
    )

    def find(self):
        return find(self.raw)

    def examples(self, place, tally):
        return examples(self.raw, *place, tally)
