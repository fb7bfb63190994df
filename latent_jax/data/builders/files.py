"""Reading what people downloaded: JSON files and images, with messages that say what is wrong with them."""

import functools
import io
import json
import os
from pathlib import Path, PurePosixPath
from typing import Any, TypeGuard, TypeVar

from latent_jax.data import images
from latent_jax.data.builders.tally import Tally
from latent_jax.errors import UserError, one_line
from latent_jax.runtime import files

T = TypeVar("T")
# GQA's scene graphs, the largest list of the official files, have 1.1 GB.
_MOST = 16 * 2**30


def read_json(file: Path, kind: type[T], shape: str) -> T:
    """The file's content, which must be a `kind`; `shape` says in words what was expected."""
    return files.read_json(file, kind, shape, _MOST)


def read_entries(file: Path, shape: str, noun: str, tally: Tally) -> dict[str, Any]:
    """The file's top-level object, not empty. A key that comes twice counts as a skipped `noun`: the first is kept.

    (Python's reader would keep the last and say nothing.)
    """
    repeated: list[str] = []

    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal repeated
        content = dict(pairs)
        if len(content) == len(pairs):
            repeated = []
            return content
        content, repeated = {}, []
        for key, value in pairs:
            if key in content:
                repeated.append(key)
            content.setdefault(key, value)
        return content

    loads = functools.partial(json.loads, object_pairs_hook=collect)
    content = files.read_json(file, dict, shape, _MOST, loads)
    if not content:
        raise UserError(f"{file}: expected {shape}, but it is empty")
    for key in repeated:  # of the outermost object, which is finished last
        tally.see(noun)
        tally.skip(noun, f"{file}: {noun} {key} comes twice")
    return content


def read_json_lines(file: Path, noun: str, tally: Tally) -> list[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of a JSON Lines file; a line that is none is counted as a skipped `noun`."""
    entries = []
    try:
        lines = (
            files.read_bytes(file, _MOST).decode("utf-8-sig").split("\n")
        )  # not splitlines: U+2028 may stand in a text
    except ValueError as error:
        raise UserError(f"{file}: expected a text file with an object a line ({error})") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            entry, reason = None, f"cannot be read as JSON ({error})"
        except RecursionError:
            entry, reason = None, "is nested too deeply"
        else:
            reason = f"is a {type(entry).__name__}"
        if isinstance(entry, dict):
            entries.append((number, entry))
        else:
            tally.see(noun)
            tally.skip(noun, f"{file}: line {number}: expected an object, but it {reason}")
    if not entries:
        raise UserError(f"{file}: expected an object a line, found none")
    return entries


def inside(root: Path, name: Any) -> Path:
    """The file `root`/`name`, where an annotation file says `name`. Raises ValueError where that leads out of `root`.

    Links that stand in the folder itself are followed: who links a folder of images into it, means it.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError(f"{str(name)[:80]!r} is no file name")
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise ValueError(f"{name[:80]!r} leads out of {root}")
    return root / name


def first_there(places: list[Path]) -> Path:
    """The first place where something is, else the first. (Path.exists raises where a name is too long.)"""
    return next((place for place in places if os.path.exists(place)), places[0])


def read_image(file: Path) -> bytes:
    """The file as it stands. Raises ValueError, which names the file, where training could not use all of it."""
    try:
        data = images.read(file, str(file))
    except UserError as error:
        raise ValueError(str(error)) from None
    return check_image(data, str(file))


def check_image(data: bytes, name: str) -> bytes:
    """`data`, where PIL can decode all of it. Raises ValueError, which calls it `name`."""
    try:
        if len(data) > images.MOST_BYTES:
            raise ValueError(f"{len(data):,} bytes, expected at most {images.MOST_BYTES:,}")
        with images.opened(io.BytesIO(data)) as image:
            images.check_aspect(image.size, name)
            image.draft("RGB", (32, 32))  # a JPEG is read to its end, but not decoded at full size
            image.load()
            images.orientation(image)
            if image.mode not in ("RGB", "RGBA", "L", "CMYK") or "transparency" in image.info:
                images.flattened(image)
    except UserError as error:  # the aspect
        raise ValueError(str(error)) from None
    except Exception as error:  # PIL raises almost anything on broken files
        # PIL names the buffer by its address, which differs from run to run.
        unknown = isinstance(error, images.PIL.UnidentifiedImageError)
        reason = "unknown format" if unknown else one_line(error) or type(error).__name__
        raise ValueError(f"{name}: not an image ({reason})") from None
    return data


def is_text(value: Any) -> TypeGuard[str]:
    """Text with something in it. A lone surrogate, which JSON can write, is no character: UTF-8 cannot hold it."""
    return isinstance(value, str) and bool(value.strip()) and is_unicode(value)


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can hold it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def as_json(value: Any) -> str:
    """`value` as JSON in ASCII. Raises ValueError where a text is no Unicode, or it is nested too deeply."""
    try:
        text = json.dumps(value)
        if "\\ud" in text:  # half of a pair, or of an emoji's whole one
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("a text with a lone surrogate, which is no character") from None
    return text


def are_texts(values: Any) -> TypeGuard[list[str]]:
    return isinstance(values, list) and bool(values) and all(map(is_text, values))


def split_name(name: str) -> str:
    """TFDS split of an official one: train2017 -> train, val2017 and val -> validation; others stay."""
    name = name.rstrip("0123456789")
    return "validation" if name in ("val", "valid") else name
