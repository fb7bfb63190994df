"""COCO captions (https://cocodataset.org/#format-data, "Image Captioning") to one record an image."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latent_jax.data.builders import parts
from latent_jax.data.builders.base import RawBuilder, each, record
from latent_jax.data.builders.files import first_there, inside, is_text, is_unicode, read_image, read_json, split_name
from latent_jax.data.builders.parts import Part, Record
from latent_jax.data.builders.tally import Tally
from latent_jax.errors import UserError

_SHAPE = '{"images": [{"id", "file_name"}, ...], "annotations": [{"id", "image_id", "caption"}, ...]}'
_Image = tuple[int, str, str, list[str]]  # its id, the official split, file_name, captions


class CocoCaptions(RawBuilder):
    """One record an image: `key` is its id, `captions` in the file's order."""

    name = "coco_captions"

    def find(self) -> dict[str, Any]:
        """Split -> (captions file, official split name)."""
        found: dict[str, tuple[Path, str]] = {}
        for file in sorted(self.raw.glob("annotations/captions_*.json")):
            official = file.stem.removeprefix("captions_")
            split = split_name(official)
            if split in found:
                raise UserError(f"{file}: {found[split][0].name} is also there and both are {split}; keep one of them")
            found[split] = file, official
        if not found:
            raise UserError(f"{self.raw}: no annotations/captions_*.json here, expected a COCO folder")
        return found

    def parts(self, place: Any, tally: Tally) -> list[Part]:
        """Images with usable captions, some at a time."""
        file, official = place
        content = read_json(file, dict, _SHAPE)
        captions = _captions(file, content, tally)
        ids: set[int] = set()
        usable: list[_Image] = []
        for image in _list(file, content, "images"):
            if not isinstance(image, dict) or type(image.get("id")) is not int or not is_text(image.get("file_name")):
                reason = f"an image without an integer id or a file_name: {str(image)[:80]}"
            elif image["id"] in ids:
                reason = f"image id {image['id']} comes twice"
            elif image["id"] not in captions:
                ids.add(image["id"])
                reason = f"image {image['id']} has no usable caption"
            else:
                ids.add(image["id"])
                usable.append((image["id"], official, image["file_name"], captions[image["id"]]))
                continue
            tally.see("image")
            tally.skip("image", f"{file}: {reason}")
        for image_id in captions.keys() - ids:
            reason = f"{file}: a caption of image {image_id}, which is not among the images"
            tally.skip("caption", reason, len(captions[image_id]))
        return parts.chunks(usable, (file,))

    def examples(self, part: Part, tally: Tally) -> Iterator[Record]:
        def make(item: _Image) -> Record:
            image_id, official, file_name, captions = item
            try:
                file = _locate(self.raw, official, file_name)
            except ValueError as error:
                raise ValueError(f"image {image_id}: file_name {error}") from None
            return record(str(image_id), images=[read_image(file)], captions=captions)

        return each(part.place, "image", tally, make, lambda item: str(item[0]))


def _captions(file: Path, content: dict[str, Any], tally: Tally) -> dict[int, list[str]]:
    """Image id -> captions in the file's order."""
    captions: dict[int, list[str]] = {}
    ids: set[int | str] = set()
    for annotation in _list(file, content, "annotations"):
        tally.see("caption")
        annotation_id = annotation.get("id") if isinstance(annotation, dict) else None
        text = annotation.get("caption") if isinstance(annotation, dict) else None
        if not isinstance(text, str) or type(annotation.get("image_id")) is not int or annotation_id is None:
            tally.skip("caption", f"{file}: an annotation without id, image_id or caption: {str(annotation)[:80]}")
        elif not isinstance(annotation_id, int | str):
            tally.skip("caption", f"{file}: an annotation whose id is no number: {str(annotation)[:80]}")
        elif not is_unicode(text):
            tally.skip("caption", f"{file}: annotation {annotation_id} has a lone surrogate, which is no character")
        elif not text.strip():
            tally.skip("caption", f"{file}: annotation {annotation_id} has an empty caption")
        elif annotation_id in ids:
            tally.skip("caption", f"{file}: annotation id {annotation_id} comes twice")
        else:
            captions.setdefault(annotation["image_id"], []).append(text.strip())
        if isinstance(annotation_id, int | str):
            ids.add(annotation_id)
    return captions


def _list(file: Path, content: dict[str, Any], key: str) -> list[Any]:
    if not isinstance(content.get(key), list) or not content[key]:
        got = "missing" if key not in content else "empty" if content[key] == [] else f"a {type(content[key]).__name__}"
        raise UserError(f"{file}: expected {_SHAPE}, but {key!r} is {got}")
    return content[key]


def _locate(raw: Path, official: str, file_name: str) -> Path:
    """In the split's folder, or under images/ as some mirrors have it."""
    folders = raw / official, raw / "images" / official, raw / "images"
    return first_there([inside(folder, file_name) for folder in folders])
