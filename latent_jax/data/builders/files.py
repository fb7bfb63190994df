"""Reading what people downloaded: JSON files and images, with messages that say what is wrong with them."""

import json
from pathlib import Path

from PIL import Image

from latent_jax.errors import UserError


def read_json(file: Path, kind: type, shape: str):
    """The file's content, which must be a `kind`; `shape` says in words what was expected."""
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{file}: expected {shape}, but it cannot be read as JSON ({error})") from None
    if not isinstance(content, kind):
        raise UserError(f"{file}: expected {shape}, got a {type(content).__name__}")
    return content


def read_image(file: Path) -> bytes:
    """The file as it stands. Raises ValueError, which names the file, where PIL cannot decode all of it."""
    try:
        with Image.open(file) as image:
            image.draft("RGB", (32, 32))  # a JPEG is read to its end, but not decoded at full size
            image.load()
    except FileNotFoundError:
        raise ValueError(f"{file}: no such image file") from None
    except Exception as error:  # PIL raises almost anything on broken files
        raise ValueError(f"{file}: not an image ({error})") from None
    return file.read_bytes()


def split_name(name: str) -> str:
    """TFDS split of an official one: train2017 -> train, val2017 and val -> validation; others stay."""
    name = name.rstrip("0123456789")
    return "validation" if name == "val" else name
