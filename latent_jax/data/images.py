"""From an image file to uint8 patches in window-major order, equal to HF's Qwen2VLImageProcessor (PIL backend).

HF resizes in uint8 and then rescales and normalises in float32. Here the pixels stay uint8 and normalisation is left
to the device, so an image costs one resize and one strided copy, and an eighth of the bytes.
"""

import dataclasses
import functools
import io
import itertools
import math
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import PIL.ExifTags
import PIL.Image
from jaxtyping import Int32, UInt8

from latent_jax.data.image_spec import ImageSpec
from latent_jax.errors import UserError, one_line
from latent_jax.runtime import files

T = TypeVar("T")
# PIL warns of odd EXIF tags, palettes and sizes, two lines an image. Files that are no image are errors, and counted.
warnings.filterwarnings("ignore", module=r"PIL\.")
# What image datasets hold. PIL knows dozens more, and one of them starts another program (PostScript).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MOST_BYTES = 256 * 2**20  # of one encoded image; PIL itself has a limit for pixels
_UPRIGHT = {  # EXIF orientation -> the transpose that makes it upright
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}


@dataclasses.dataclass(frozen=True, eq=False)
class Patches:
    """p patches of one image or video, window-major: windows one after the other, merged tokens whole inside them.

    patches (p, c) uint8, c = (channel, temporal, row, column) flattened, with no temporal axis for a still; grid
    (slices, rows, columns) in patches; positions (p, 2) int32 row and column in the patch grid; window, image (p,)
    int32 ids from 1, an image id being a temporal slice.
    """

    patches: UInt8[np.ndarray, "p c"]
    grid: tuple[int, int, int]
    positions: Int32[np.ndarray, "p 2"]
    window: Int32[np.ndarray, " p"]
    image: Int32[np.ndarray, " p"]


def open_image(source: Any, name: str = "") -> PIL.Image.Image:
    """An RGB image from a path, encoded bytes, a PIL image or a uint8 array, as stock transformers would see it.

    Encoded files (paths, bytes) pass `transformers.image_utils.load_image` first: upright by their EXIF tag, an alpha
    channel dropped. Images in memory go straight to the image processor: as they stand, alpha laid on white (its
    convert_to_rgb). Raises UserError naming the file, or `name`, where it is not a whole image.
    """
    if isinstance(source, PIL.Image.Image):
        return _checked(functools.partial(_on_white, source), name or "image")
    if isinstance(source, np.ndarray):
        return _from_array(source, name or "image")
    if isinstance(source, bytes | bytearray | memoryview):
        return _checked(functools.partial(_decode, io.BytesIO(source)), name or "image bytes")
    if isinstance(source, str | os.PathLike):
        where = f"{name}: {source}" if name else str(source)
        if not os.path.isfile(source):
            raise UserError(f"{where}: no such image file")
        return _checked(functools.partial(_decode, io.BytesIO(read(source, where))), where)
    raise UserError(f"{name or 'image'}: expected a path, bytes, a PIL image or an array, got {type(source).__name__}")


def read(file: str | os.PathLike, name: str) -> bytes:
    """The bytes of an image file. Raises UserError with `name` if there is none, or if it is larger than MOST_BYTES."""
    path: str = os.fspath(file)
    try:
        return files.read_bytes(path, MOST_BYTES)
    except UserError as problem:
        reason = str(problem).removeprefix(f"{path}: ")
        raise UserError(
            f"{name}: no such image file" if reason.startswith("no such") else f"{name}: {reason}"
        ) from None


def opened(file: io.BytesIO) -> PIL.Image.Image:
    """PIL's image of an encoded file, its header read. Whatever is in none of FORMATS is unknown here."""
    return PIL.Image.open(file, formats=FORMATS)


def _decode(file: io.BytesIO) -> PIL.Image.Image:
    with opened(file) as image:
        image.load()
        return flattened(image)


def flattened(image: PIL.Image.Image) -> PIL.Image.Image:
    """A decoded file upright and in RGB."""
    # PIL's exif_transpose writes the other tags again, and fails where one of them has a wrong type.
    turn = _UPRIGHT.get(orientation(image))
    # A palette's transparent colour outlives this conversion as a colour key, which HF's processor paints white.
    return _on_white(_rgb(image if turn is None else image.transpose(turn)))


def orientation(image: PIL.Image.Image) -> int:
    """The EXIF orientation, 1 (upright) to 8; 1 if the tag has another value."""
    found = image.getexif().get(PIL.ExifTags.Base.Orientation, 1)
    return found if isinstance(found, int) and found in _UPRIGHT else 1


def _rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """`image.convert("RGB")` without the copy that PIL makes of an RGB image."""
    return image if image.mode == "RGB" else image.convert("RGB")


def _on_white(image: PIL.Image.Image) -> PIL.Image.Image:
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return _rgb(image)


def _checked(read: Callable[[], PIL.Image.Image], name: str) -> PIL.Image.Image:
    image = guarded(read, name)
    check_aspect(image.size, name)
    return image


def guarded(read: Callable[[], T], name: str) -> T:
    """The result of `read()`; exceptions of PIL over a broken file become a UserError with its name."""
    try:
        return read()
    except UserError:
        raise
    except PIL.UnidentifiedImageError:
        raise UserError(f"{name}: not an image in a known format ({', '.join(FORMATS)})") from None
    except Exception as problem:  # PIL raises almost anything on broken files
        raise UserError(f"{name}: not a whole image ({one_line(problem) or type(problem).__name__})") from None


def check_aspect(size: tuple[int, int], name: str) -> None:
    """Raises UserError where an image of (width, height) is too narrow for the model's preprocessing."""
    if max(size) > 200 * min(size):
        raise UserError(f"{name}: {size[0]}x{size[1]} pixels; expected an aspect ratio of at most 200")


def _from_array(array: np.ndarray, name: str) -> PIL.Image.Image:
    if array.dtype != np.uint8 or array.ndim not in (2, 3):
        raise UserError(f"{name}: expected a uint8 array (rows, columns[, channels]), got {array.dtype} {array.shape}")
    if array.ndim == 2:
        array = array[..., None]
    elif array.shape[0] in (1, 3, 4):  # HF takes the channels from the first axis where both would do
        array = np.moveaxis(array, 0, -1)
    if array.shape[-1] == 1:
        array = np.repeat(array, 3, axis=-1)
    elif array.shape[-1] == 4:
        alpha = array[..., 3:] / 255
        array = np.round(alpha * array[..., :3] + (1 - alpha) * 255).astype(np.uint8)
    if array.shape[-1] != 3 or 0 in array.shape:
        raise UserError(f"{name}: expected 1, 3 or 4 channels and some pixels, got the shape {array.shape}")
    return _checked(functools.partial(PIL.Image.fromarray, np.ascontiguousarray(array)), name)


def smart_resize(rows: int, columns: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Size in pixels, multiples of `factor` inside the pixel limits, nearest to the given one (HF smart_resize)."""
    if max(rows, columns) > 200 * min(rows, columns):
        raise UserError(f"image of {columns}x{rows} pixels; expected an aspect ratio of at most 200")
    new_rows, new_columns = round(rows / factor) * factor, round(columns / factor) * factor
    if new_rows * new_columns > max_pixels:
        shrink = math.sqrt(rows * columns / max_pixels)
        new_rows = max(factor, math.floor(rows / shrink / factor) * factor)
        new_columns = max(factor, math.floor(columns / shrink / factor) * factor)
    elif new_rows * new_columns < min_pixels:
        grow = math.sqrt(min_pixels / (rows * columns))
        new_rows = math.ceil(rows * grow / factor) * factor
        new_columns = math.ceil(columns * grow / factor) * factor
    return new_rows, new_columns


def patchify(image: PIL.Image.Image, spec: ImageSpec) -> Patches:
    """A still RGB image as patches of c = 3 * patch_size^2 values (HF repeats them over the temporal kernel)."""
    return _patches([[_resized(image, spec)]], spec)


def patchify_video(frames: Sequence[PIL.Image.Image], spec: ImageSpec) -> Patches:
    """RGB frames of one size as patches over groups of temporal_patch_size frames, the last frame repeated to fill.

    c = 3 * temporal_patch_size * patch_size^2 (HF Qwen2VLVideoProcessor.patchify).
    """
    if not frames or len({frame.size for frame in frames}) != 1:
        raise UserError(f"video: expected frames of one size, got {sorted({frame.size for frame in frames})}")
    pixels = [_resized(frame, spec) for frame in frames]
    temporal = spec.temporal_patch_size
    pixels += pixels[-1:] * (-len(pixels) % temporal)
    return _patches([pixels[at : at + temporal] for at in range(0, len(pixels), temporal)], spec)


def _resized(image: PIL.Image.Image, spec: ImageSpec) -> list[UInt8[np.ndarray, "rows columns"]]:
    """The three channels, apart: then a patch's row is one run of bytes."""
    rows, columns = smart_resize(image.height, image.width, spec.factor, spec.min_pixels, spec.max_pixels)
    resized = image.resize((columns, rows), PIL.Image.Resampling.BICUBIC)
    return [np.asarray(channel) for channel in resized.split()]


def _patches(pixels: Sequence[Sequence[Sequence[np.ndarray]]], spec: ImageSpec) -> Patches:
    """Patches of pixels[slice][frame][channel], each (rows, columns)."""
    slices, temporal, channels = len(pixels), len(pixels[0]), len(pixels[0][0])
    rows, columns = pixels[0][0][0].shape
    ps, merge = spec.patch_size, spec.merge_size
    grid = (slices, rows // ps, columns // ps)
    # NumPy moves a patch's row as one item of ps bytes, faster than byte by byte.
    run = np.dtype((np.void, ps))
    out = np.empty((math.prod(grid), channels, temporal, ps), run)
    done = 0
    for frames in pixels:
        # A strip of equal windows at a time: each is one strided copy straight to its place.
        for top, bottom, left, right, count in _strips(grid[1:], spec):
            size = (bottom - top) * (right - left)
            place = out[done : done + size].reshape(count, (bottom - top) // merge, -1, merge, merge, *out.shape[1:])
            for frame, channel in itertools.product(range(temporal), range(channels)):
                strip = frames[frame][channel].view(run)[top * ps : bottom * ps, left:right]
                strip = strip.reshape((bottom - top) // merge, merge, ps, count, -1, merge)
                # (r, i, row, window, c, j) -> window, r, c, i, j, row
                place[..., channel, frame, :] = strip.transpose(3, 0, 4, 1, 5, 2)
            done += size
    return arranged(out.view(np.uint8).reshape(len(out), -1), grid, spec)


def arranged(patches: UInt8[np.ndarray, "p c"], grid: tuple[int, int, int], spec: ImageSpec) -> Patches:
    """Window-major patches of a grid (slices, rows, columns) with the positions and ids that follow from it."""
    slices = grid[0]
    positions, window = _window_order(grid[1:], spec)
    windows = window[-1] * np.repeat(np.arange(slices, dtype=np.int32), len(window))
    image = np.repeat(np.arange(1, slices + 1, dtype=np.int32), len(window))
    return Patches(patches, grid, np.tile(positions, (slices, 1)), np.tile(window, slices) + windows, image)


def _strips(grid: tuple[int, int], spec: ImageSpec) -> list[tuple[int, int, int, int, int]]:
    """(top, bottom, left, right, windows) in patches, in window order: runs of equal windows, then the narrower one."""
    rows, columns = grid
    side = spec.window_size // spec.patch_size
    whole = columns // side * side
    strips = []
    for top in range(0, rows, side):
        bottom = min(top + side, rows)
        if whole:
            strips.append((top, bottom, 0, whole, whole // side))
        if whole < columns:
            strips.append((top, bottom, whole, columns, 1))
    return strips


@functools.lru_cache(maxsize=512)
def _window_order(grid: tuple[int, int], spec: ImageSpec) -> tuple[np.ndarray, np.ndarray]:
    """Positions (p, 2) and window ids (p,) from 1 of one slice's patches in window-major, merge-grouped order."""
    rows, columns = np.indices(grid, dtype=np.int32)
    merge = spec.merge_size
    side = spec.window_size // spec.patch_size
    window = rows // side * -(-grid[1] // side) + columns // side
    order = np.lexsort([key.ravel() for key in (columns, rows, columns // merge, rows // merge, window)])
    positions = np.stack([rows.ravel()[order], columns.ravel()[order]], axis=1)
    ids = window.ravel()[order] + np.int32(1)
    for array in (positions, ids):
        array.flags.writeable = False  # shared by every image of this size
    return positions, ids


def merged_index(patches: Patches, merge_size: int) -> Int32[np.ndarray, " m"]:
    """For each merged token in reading order (slice, row, column), its index in window-major order."""
    slices, rows, columns = patches.grid
    first = patches.positions[:: merge_size**2] // merge_size
    slice_of = patches.image[:: merge_size**2] - 1
    reading = (slice_of * (rows // merge_size) + first[:, 0]) * (columns // merge_size) + first[:, 1]
    return np.argsort(reading).astype(np.int32)


def widen(patches: UInt8[np.ndarray, "p c"], channels: int) -> UInt8[np.ndarray, "p channels"]:
    """Stills (no temporal axis) as patches of a clip whose frames are all alike; HF does this to every still."""
    if patches.shape[1] == channels:
        return patches
    still = patches.reshape(len(patches), 3, 1, -1)
    return np.broadcast_to(still, (len(patches), 3, channels // patches.shape[1], still.shape[3])).reshape(-1, channels)
