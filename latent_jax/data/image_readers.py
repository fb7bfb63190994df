"""Two image readers: `ImageDecoder` decodes and resizes to patches; `SizeReader` reads only the size, from the header,
and returns zero patches of the same shape.

Packing needs sizes only. A host reads the size of every image and decodes those of its own groups.
"""

import dataclasses
import functools
import io
import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.ExifTags
import PIL.Image

from latent_jax.data import images
from latent_jax.data.image_spec import ImageSpec
from latent_jax.data.images import Patches
from latent_jax.errors import UserError

_TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange rows and columns


@dataclasses.dataclass(frozen=True)
class ImageDecoder:
    """Patches with their pixels. Sources and errors are those of `images.open_image`."""

    spec: ImageSpec

    def still(self, source: Any, name: str) -> Patches:
        return images.patchify(images.open_image(source, name), self.spec)

    def video(self, frames: Sequence[Any], name: str) -> Patches:
        return images.patchify_video([images.open_image(frame, name) for frame in frames], self.spec)


@dataclasses.dataclass(frozen=True)
class SizeReader:
    """The patches of `ImageDecoder` with every pixel 0. It misses what only decoding finds (a truncated file)."""

    spec: ImageSpec

    def still(self, source: Any, name: str) -> Patches:
        return self._zeros(image_size(source, name), 1, 1)

    def video(self, frames: Sequence[Any], name: str) -> Patches:
        sizes = {image_size(frame, name) for frame in frames}
        if len(sizes) != 1:
            raise UserError(f"video: expected frames of one size, got {sorted(sizes)}")
        temporal = self.spec.temporal_patch_size
        return self._zeros(sizes.pop(), math.ceil(len(frames) / temporal), temporal)

    def _zeros(self, size: tuple[int, int], slices: int, temporal: int) -> Patches:
        spec, (width, height) = self.spec, size
        rows, columns = images.smart_resize(height, width, spec.factor, spec.min_pixels, spec.max_pixels)
        grid = (slices, rows // spec.patch_size, columns // spec.patch_size)
        shape = (math.prod(grid), 3 * temporal * spec.patch_size**2)
        return images.arranged(np.broadcast_to(np.uint8(0), shape), grid, spec)


def image_size(source: Any, name: str = "") -> tuple[int, int]:
    """(width, height) of `images.open_image(source, name)`; of an encoded file from its header alone.

    Raises UserError as `open_image` does, except for faults that only decoding finds.
    """
    if isinstance(source, str | os.PathLike) and os.path.isfile(source):
        where = f"{name}: {source}" if name else str(source)
        data = images.read(source, where)
    elif isinstance(source, bytes | bytearray | memoryview):
        data, where = bytes(source), name or "image bytes"
    else:
        return images.open_image(source, name).size
    size = images.guarded(functools.partial(_upright_size, data), where)
    images.check_aspect(size, where)
    return size


def _upright_size(data: bytes) -> tuple[int, int]:
    with images.opened(io.BytesIO(data)) as image:
        # A PNG may keep its EXIF behind the pixels, and PIL decodes it to look there; most hold no such thing.
        anywhere = image.format != "PNG" or b"eXIf" in data or b"Raw profile type" in data
        exif = image.getexif() if anywhere else PIL.Image.Image.getexif(image)
        turned = exif.get(PIL.ExifTags.Base.Orientation) in _TURNED
        return image.size[::-1] if turned else image.size
