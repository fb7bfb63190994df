"""Parts to tokens: the trunk of a layout or one of its views, as arrays that make up an Example."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int32, UInt8

from latent_jax.data import images as pixels
from latent_jax.data.image_spec import ImageSpec
from latent_jax.data.images import Patches
from latent_jax.data.layout import Image, Part, Read, Slots, Text, Video, without_empty
from latent_jax.data.messages import record
from latent_jax.data.positions import Grid
from latent_jax.errors import UserError

if TYPE_CHECKING:
    from latent_jax.data.chat import Processor

IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"
LOSS, LATE, HIDDEN, REGRESSED = 1, 2, 4, 8  # flags of a token
# Placeholders in feature indices until the whole example's slots are counted, by Slots.source.
_SOURCES = {"learned": -2, "given": -3, "written": -4}


@dataclasses.dataclass(frozen=True, eq=False)
class Stretch:
    """t tokens with their flags and feature marks; position spans; the tokens that are read, -1 the one before all."""

    tokens: Int32[np.ndarray, " t"]
    flags: UInt8[np.ndarray, " t"]
    features: Int32[np.ndarray, " t"]
    spans: list[int | Grid]
    reads: list[int]


@dataclasses.dataclass(frozen=True, eq=False)
class Visual:
    """Patches of an image or video with its place among the example's."""

    patches: Patches
    first_merged: int
    first_image: int
    spec: ImageSpec

    @property
    def merged_grid(self) -> tuple[int, int, int]:
        slices, rows, columns = self.patches.grid
        return slices, rows // self.spec.merge_size, columns // self.spec.merge_size

    @property
    def features(self) -> np.ndarray:
        return self.first_merged + pixels.merged_index(self.patches, self.spec.merge_size)


def stretch(processor: "Processor", parts: Sequence[Part], visuals: Mapping[int, Visual], key: str) -> Stretch:
    """The trunk or one view. Raises UserError naming the record where a text cannot be shown, or where nothing is."""
    pieces: list[Stretch] = []
    texts: list[Text | Read] = []
    for part in (*without_empty(parts), None):
        if isinstance(part, Text | Read):
            texts.append(part)
            continue
        if texts:
            pieces.append(_text(processor, texts, key))
            texts = []
        if part is not None:
            pieces.append(_block(processor, part, visuals))
    if not pieces:
        raise UserError(f"{record(key)}nothing to show (an empty trunk or view)")
    reads, start = [], 0
    for piece in pieces:
        reads += [start + read for read in piece.reads]
        start += len(piece.tokens)
    return Stretch(
        tokens=np.concatenate([piece.tokens for piece in pieces]),
        flags=np.concatenate([piece.flags for piece in pieces]),
        features=np.concatenate([piece.features for piece in pieces]),
        spans=[span for piece in pieces for span in piece.spans],
        reads=reads,
    )


def _text(processor: "Processor", parts: Sequence[Text | Read], key: str) -> Stretch:
    """Adjacent texts tokenised as one string; a token has the flags of all of its characters."""
    texts = [part for part in parts if isinstance(part, Text)]
    text = "".join([part.text for part in texts])
    if IMAGE_PAD in text or VIDEO_PAD in text:
        raise UserError(f"{record(key)}{IMAGE_PAD} or {VIDEO_PAD} stands in its text")
    try:
        encoding = processor.encode(text)
    except UserError as problem:
        raise UserError(f"{record(key)}{problem}") from None
    start, end = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
    end = np.maximum(end, np.minimum(start + 1, len(text)))
    lengths = [len(part.text) for part in texts]

    def touched(flagged: Sequence[bool]) -> np.ndarray:
        before = np.concatenate([[0], np.cumsum(np.repeat(flagged, lengths))])
        return before[end] > before[start]

    flags = touched([part.loss for part in texts]) * np.uint8(LOSS)
    if any(part.late for part in texts):
        flags |= touched([part.late for part in texts]) * np.uint8(LATE)
    reads = []
    if len(texts) < len(parts):
        # A Read is of the token of the last character before it; -1: of the last token before this text.
        ends = itertools.accumulate(len(part.text) if isinstance(part, Text) else 0 for part in parts)
        reads = [int((start < at).sum()) - 1 for at, part in zip(ends, parts, strict=True) if isinstance(part, Read)]
    tokens = np.array(encoding.ids, np.int32)
    return Stretch(tokens, flags, np.full(len(tokens), -1, np.int32), [len(tokens)], reads)


def _block(processor: "Processor", part: Image | Video | Slots, visuals: Mapping[int, Visual]) -> Stretch:
    """Placeholders, between the vision marks where the part has them."""
    flags, opening, closing = 0, 0, 0
    span: int | Grid
    if isinstance(part, Slots):
        span = part.shape if isinstance(part.shape, int) else Grid(1, *part.shape)
        features = np.full(part.count, _SOURCES[part.source], np.int32)
        opening, closing = LOSS * (part.loss != ""), LOSS * (part.loss == "both")
    else:
        visual = visuals[part.index]
        interval = processor.tokens_per_second * part.second_per_grid if isinstance(part, Video) else 1.0
        span, features = Grid(*visual.merged_grid, interval), visual.features
        if isinstance(part, Image):
            closing = HIDDEN * part.hidden
            opening, flags = closing | LOSS * part.loss, closing | REGRESSED * part.loss
    pad = processor.video_token_id if isinstance(part, Video) else processor.image_token_id
    count = len(features)
    if isinstance(part, Slots) and not part.marks:
        return Stretch(np.full(count, pad, np.int32), np.full(count, flags, np.uint8), features, [span], [])
    before, after = processor.vision_marks
    return Stretch(
        _between(before, np.full(count, pad, np.int32), after),
        _between(opening, np.full(count, flags, np.uint8), closing),
        _between(-1, features, -1),
        [1, span, 1],
        [],
    )


def _between(before: int, inside: np.ndarray, after: int) -> np.ndarray:
    found = np.empty(len(inside) + 2, inside.dtype)
    found[0], found[1:-1], found[-1] = before, inside, after
    return found


def number_slots(features: Int32[np.ndarray, " t"], merged: int) -> Int32[np.ndarray, " S"]:
    """Numbers an example's slots and given features, in place; `merged` visual tokens come before them.

    Returns the tokens of its learned and written slots.
    """
    if features.min(initial=-1) == -1:
        return np.zeros(0, np.int32)
    slots = np.flatnonzero((features == _SOURCES["learned"]) | (features == _SOURCES["written"])).astype(np.int32)
    given = np.flatnonzero(features == _SOURCES["given"])
    features[slots] = np.where(features[slots] == _SOURCES["learned"], merged + np.arange(len(slots)), -1)
    features[given] = merged + len(slots) + np.arange(len(given))
    return slots


def reads(stretches: Sequence[Stretch], key: str) -> Int32[np.ndarray, " Q"]:
    """The example's tokens that are read; a Read at the beginning of a view is of the trunk's last token."""
    if not any(each.reads for each in stretches):
        return np.zeros(0, np.int32)
    starts = itertools.accumulate((len(each.tokens) for each in stretches), initial=0)
    before = [-1, *[len(stretches[0].tokens) - 1] * (len(stretches) - 1)]
    found = [
        last if read < 0 else start + read
        for start, last, each in zip(starts, before, stretches, strict=False)
        for read in each.reads
    ]
    if -1 in found:
        raise ValueError(f"record {key!r}: a Read stands before the first token")
    return np.array(found, np.int32)


def asked(flags: UInt8[np.ndarray, " t"]) -> dict[str, np.ndarray]:
    """The fields of an Example that only some layouts have."""
    found: dict[str, np.ndarray] = {}
    present = np.bitwise_or.reduce(flags)
    if present & REGRESSED:
        found["feature_weights"] = ((flags & REGRESSED) > 0).astype(np.float32)
    if present & HIDDEN:
        found |= {"hidden": (flags & HIDDEN) > 0, "late": (flags & LATE) > 0}
    return found


def successors(values: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Each place's successor in its own stretch; 0 at the last place of each."""
    found = np.empty_like(values)
    found[:-1] = values[1:]
    found[ends] = 0
    return found
