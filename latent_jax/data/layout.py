"""What the model is to see, as plain values: a Layout of parts, and the Example of arrays that it becomes.

Numpy and strings only, so that data workers and the host halves of methods import it for nothing.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Float32, Int32, UInt8

from latent_jax.errors import UserError

# Text may be cut beside these without changing its tokens: they are special tokens of every Qwen chat tokenizer, and a
# tokenizer splits at special tokens before it merges anything.
BOUNDARIES = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
_SPLIT = re.compile("(" + "|".join(map(re.escape, BOUNDARIES)) + ")")


@dataclasses.dataclass(frozen=True)
class Text:
    """A piece of text, special tokens allowed.

    loss: its tokens are predicted under the next-token loss. late: its tokens do not see hidden images.
    """

    text: str
    loss: bool = False
    late: bool = False


@dataclasses.dataclass(frozen=True)
class Image:
    """An image: `<|vision_start|> <|image_pad|>... <|vision_end|>`. `index` points into Layout.images.

    loss: its opening mark is predicted under the next-token loss, its visual tokens are regressed (feature_weights).
    hidden: late text does not see it, marks included.
    """

    index: int
    loss: bool = False
    hidden: bool = False


@dataclasses.dataclass(frozen=True)
class Video:
    """A video: as Image, with `<|video_pad|>`. Layout.images[index] is a list of frames.

    `second_per_grid` is the time in seconds between two temporal slices (temporal_patch_size / frames per second).
    """

    index: int
    second_per_grid: float = 1.0


@dataclasses.dataclass(frozen=True)
class Slots:
    """Positions whose input embeddings are latents instead of a token's; their tokens are `<|image_pad|>`.

    shape: their number, with M-RoPE positions that count up as those of text; or (rows, columns), with the positions
    of an image of so many merged tokens.
    marks: `<|vision_start|>` and `<|vision_end|>` around them.
    loss: the opening mark, or both, are predicted under the next-token loss.
    source: "learned" embeddings that all examples share; latents "given" with the prompt; or "written" over the token's
    embedding by the method itself.
    """

    shape: int | tuple[int, int]
    marks: bool = True
    loss: Literal["", "open", "both"] = ""
    source: Literal["learned", "given", "written"] = "learned"

    def __post_init__(self) -> None:
        if self.loss and not self.marks:
            raise ValueError(f"{self}: has no marks to predict")

    @property
    def count(self) -> int:
        return self.shape if isinstance(self.shape, int) else math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Read:
    """Asks for the final hidden state of the token before it. Takes no position and cuts no text."""


Part = Text | Image | Video | Slots | Read


@dataclasses.dataclass(frozen=True)
class Layout:
    """What one example shows: a trunk that every view sees, and the views, each blind to the others.

    `images` holds encoded bytes, paths, PIL images or uint8 arrays; for a Video a list of these. `targets` are the
    indices of the J images whose latents are predicted (they need not be shown); `latents` (S, Z) are those latents
    themselves, where a cache has them, and then no image is needed. `key` names the record in messages.
    """

    images: tuple[Any, ...] = ()
    trunk: tuple[Part, ...] = ()
    views: tuple[tuple[Part, ...], ...] = ()
    targets: tuple[int, ...] = ()
    key: str = ""
    latents: np.ndarray | None = None

    def __post_init__(self) -> None:
        for part in (*self.trunk, *(part for view in self.views for part in view)):
            if isinstance(part, Image | Video) and not 0 <= part.index < len(self.images):
                raise UserError(f"record {self.key!r}: {part} points outside its {len(self.images)} image(s)")
        for target in self.targets:
            if not 0 <= target < len(self.images):
                raise UserError(f"record {self.key!r}: target {target} points outside its {len(self.images)} image(s)")


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """One laid-out Layout: t tokens, p patches, m = p / merge_size^2 merged visual tokens, S slots, J targets, Q reads.

    loss_weights: the weight of predicting targets[i] from token i. feature_index: -1 the token's own embedding, 0..m-1
    a merged visual token (in window-major order), m + s slot s where it is learned, and from m + S the given features
    in order.
    patches: window-major and merge-grouped; patch_positions: row and column in the image's patch grid; patch_window,
    patch_image: local from 1, an image id being one temporal slice.
    slots: the tokens of learned and written slots. reads: the tokens whose final hidden states are asked for.
    target_image: local ids from 1; target_grid: their merged rows and columns.
    feature_weights: the weight of regressing the visual token at t from the hidden state before it. late tokens do not
    see hidden ones. None where no part asks for them.
    target_latents: the latents of the targets, if a cache gives them; None: they are computed from the target images.
    """

    tokens: Int32[np.ndarray, " t"]
    view_ids: Int32[np.ndarray, " t"]
    positions: Int32[np.ndarray, "3 t"]
    targets: Int32[np.ndarray, " t"]
    loss_weights: Float32[np.ndarray, " t"]
    feature_index: Int32[np.ndarray, " t"]
    patches: UInt8[np.ndarray, "p c"]
    patch_positions: Int32[np.ndarray, "p 2"]
    patch_window: Int32[np.ndarray, " p"]
    patch_image: Int32[np.ndarray, " p"]
    slots: Int32[np.ndarray, " S"]
    reads: Int32[np.ndarray, " Q"]
    target_image: Int32[np.ndarray, " J"]
    target_grid: Int32[np.ndarray, "J 2"]
    key: str = ""
    feature_weights: Float32[np.ndarray, " t"] | None = None
    hidden: Bool[np.ndarray, " t"] | None = None
    late: Bool[np.ndarray, " t"] | None = None
    target_latents: Float[np.ndarray, "_ Z"] | None = None


@dataclasses.dataclass(frozen=True)
class Room:
    """What one example of a batch has room for beside tokens and patches: S slots, J targets, Q reads.

    regress: examples may hold `feature_weights`. hidden: they may hold `hidden` and `late`.
    """

    slots: int = 0
    targets: int = 0
    reads: int = 0
    regress: bool = False
    hidden: bool = False


def with_learned_slots(layout: Layout) -> Layout:
    """The layout with learned embeddings in all its Slots, such as the places of imagined latents."""

    def learned(parts: Sequence[Part]) -> tuple[Part, ...]:
        return tuple(dataclasses.replace(p, source="learned") if isinstance(p, Slots) else p for p in parts)

    return dataclasses.replace(layout, trunk=learned(layout.trunk), views=tuple(map(learned, layout.views)))


def without_empty(parts: Sequence[Part]) -> list[Part]:
    """The parts without Slots of no token, which are no border of words either."""
    return [part for part in parts if not isinstance(part, Slots) or part.count or part.marks]


def share_trunk(conversations: Sequence[Sequence[Part]]) -> tuple[tuple[Part, ...], tuple[tuple[Part, ...], ...]]:
    """Splits conversations that begin alike into (trunk, views), tokens unchanged: trunk + views[i] is conversation i.

    The cut is beside a special token or a part that is not text, and before the last stretch of loss-carrying parts of
    every conversation together with the part that it is predicted from. One conversation alone needs no views.
    """
    if len(conversations) == 1:
        return tuple(conversations[0]), ()
    atoms = [_atoms(parts) for parts in conversations]
    cut = 0
    limit = min(map(_before_last_answer, atoms))
    while cut < limit and all(each[cut] == atoms[0][cut] for each in atoms):
        cut += 1
    while cut and not all(_may_cut(each, cut) for each in atoms):
        cut -= 1
    return _joined(atoms[0][:cut]), tuple(_joined(each[cut:]) for each in atoms)


def _atoms(parts: Sequence[Part]) -> list[Part]:
    """Parts cut at every place where cutting cannot change tokens."""
    atoms: list[Part] = []
    for part in _joined(parts):
        if isinstance(part, Text):
            atoms += [Text(piece, part.loss, part.late) for piece in _SPLIT.split(part.text) if piece]
        else:
            atoms.append(part)
    return atoms


def _before_last_answer(atoms: Sequence[Part]) -> int:
    """How many atoms may go to the trunk: the last answer and one atom before it (its predictor) stay in the view."""
    end = len(atoms)
    while end and not _carries_loss(atoms[end - 1]):
        end -= 1
    if not end:
        return len(atoms) - 1
    while end and (_carries_loss(atoms[end - 1]) or isinstance(atoms[end - 1], Read)):
        end -= 1
    return max(0, end - 1)


def _may_cut(atoms: Sequence[Part], at: int) -> bool:
    """Whether a view may begin with atom `at`: its first token has a predictor in the view, and no text is cut in two
    but beside a special token. A Read is no place to cut: it has no token."""
    first, last = at, at - 1
    while first < len(atoms) and isinstance(atoms[first], Read):
        first += 1
    while last >= 0 and isinstance(atoms[last], Read):
        last -= 1
    before, after = atoms[last] if last >= 0 else None, atoms[first] if first < len(atoms) else None
    if _carries_loss(after):
        return False
    if isinstance(before, Text) and isinstance(after, Text):
        return before.text in BOUNDARIES or after.text in BOUNDARIES
    return True


def _carries_loss(part: Part | None) -> bool:
    return bool(getattr(part, "loss", False))


def _joined(parts: Sequence[Part]) -> tuple[Part, ...]:
    """Adjacent texts of equal flags made one."""
    joined: list[Part] = []
    for part in without_empty(parts):
        last = joined[-1] if joined else None
        if isinstance(part, Text) and isinstance(last, Text) and (part.loss, part.late) == (last.loss, last.late):
            joined[-1] = Text(last.text + part.text, last.loss, last.late)
        else:
            joined.append(part)
    return tuple(joined)
