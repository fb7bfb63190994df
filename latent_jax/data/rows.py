"""Prompts laid out for the model to read at once: one a row, or packed; shapes are buckets that many batches share."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from latent_jax.data.layout import Example
from latent_jax.data.packing import first_fit

# Least sizes of a compiled program; larger ones grow by a third or a half, see bucket.
TOKENS, PATCHES = 32, 64


class Rows(NamedTuple):
    """R prompts in B rows of T tokens, with the images of all of them in one group.

    `places`: flat index row * T + t of each prompt's tokens in order, padded by repeating the last; `lengths`: how many
    are real (0: no prompt, only padding); `next_position`: M-RoPE position of the first token to come.
    """

    batch: dict[str, np.ndarray]
    places: Int32[np.ndarray, "R U"]
    lengths: Int32[np.ndarray, " R"]
    next_position: Int32[np.ndarray, " R"]
    image_patches: int


def bucket(size: int, least: int = 1) -> int:
    """The smallest of least x 1, 2, 3, 4, 6, 8, 12, 16, 24, ... that holds `size`: few programs, little padding."""
    multiple = -(-max(size, 1) // least)
    power = 1 << (multiple - 1).bit_length()
    return least * (power * 3 // 4 if power >= 4 and multiple <= power * 3 // 4 else power)


def one_per_row(examples: Sequence[Example], config) -> Rows:
    """Lays prompts out one a row; R and B are their number.

    Args:
      examples: laid-out prompts; an Imagined part's features follow each other in the order of the examples.
      config: the model's Config.
    """
    T = bucket(max(len(e.tokens) for e in examples), TOKENS)
    R = len(examples)
    return _rows(examples, [(r, 0) for r in range(R)], (R, T), (R, T), config)


def packed(examples: Sequence[Example], config) -> Rows:
    """As one_per_row, several prompts a row where they fit: short ones do not pay for the longest. R, B, T and U are
    buckets."""
    U = bucket(max(len(e.tokens) for e in examples), TOKENS)
    tried = {T: _first_fit(examples, T) for T in (U, bucket(U + 1, TOKENS), 2 * U)}
    # Fewest tokens; then the shortest rows, since attention looks at whole rows.
    T = min(tried, key=lambda T: (bucket(1 + max(row for row, _ in tried[T])) * T, T))
    B = bucket(1 + max(row for row, _ in tried[T]))
    return _rows(examples, tried[T], (B, T), (bucket(len(examples)), U), config)


def _first_fit(examples: Sequence[Example], T: int) -> list[tuple[int, int]]:
    """(row, first token) of every example in rows of T tokens; the longest come first, short ones fill what is left."""
    longest_first = sorted(range(len(examples)), key=lambda number: -len(examples[number].tokens))
    places = first_fit((len(examples[number].tokens) for number in longest_first), T)
    return [place for _, place in sorted(zip(longest_first, places, strict=True))]


def _rows(
    examples: Sequence[Example], starts: list[tuple[int, int]], shape: tuple[int, int], prompts: tuple[int, int], config
) -> Rows:
    """Writes every example at its (row, token) into B rows of T tokens; `prompts` are R and U."""
    unit, window = config.vision.merge_unit, config.vision.window_patches
    slices = [int(np.bincount(e.patch_image).max(initial=0)) for e in examples]
    image_patches = bucket(max([window, *slices]), window)
    patches = sum(len(e.patches) for e in examples)
    patches = bucket(patches, math.lcm(PATCHES, unit)) if patches else 0
    channels = max([e.patches.shape[1] for e in examples if len(e.patches)], default=1)
    (B, T), (R, U) = shape, prompts

    rows = {k: np.zeros((1, B, T), np.int32) for k in ("tokens", "segment_ids", "view_ids")}
    rows |= {"feature_index": np.full((1, B, T), -1, np.int32), "positions": np.zeros((1, B, 3, T), np.int32)}
    group = {k: np.zeros((1, patches), np.int32) for k in ("patch_window", "patch_image")}
    group |= {"patches": np.zeros((1, patches, channels), np.uint8)}
    group |= {"patch_positions": np.zeros((1, patches, 2), np.int32)}
    places = np.zeros((R, U), np.int32)
    at = images = windows = given = 0
    for number, (e, (row, start)) in enumerate(zip(examples, starts, strict=True)):
        t, p, m = len(e.tokens), len(e.patches), len(e.patches) // unit
        span = slice(start, start + t)
        rows["tokens"][0, row, span], rows["view_ids"][0, row, span] = e.tokens, e.view_ids
        rows["segment_ids"][0, row, span] = number + 1
        rows["positions"][0, row, :, span] = e.positions
        offset = np.where(e.feature_index < m, at // unit, patches // unit + given - m)
        rows["feature_index"][0, row, span] = np.where(e.feature_index < 0, -1, e.feature_index + offset)
        places[number] = row * T + start + np.minimum(np.arange(U), t - 1)
        given += given_features(e, config)
        if p:
            place = slice(at, at + p)
            group["patches"][0, place], group["patch_positions"][0, place] = _frames(e, channels), e.patch_positions
            group["patch_image"][0, place] = e.patch_image + images
            group["patch_window"][0, place] = e.patch_window + windows
            at, images, windows = at + p, images + e.patch_image.max(), windows + e.patch_window.max()
    lengths, following = np.zeros(R, np.int32), np.zeros(R, np.int32)
    lengths[: len(examples)] = [len(e.tokens) for e in examples]
    following[: len(examples)] = [next_position(e) for e in examples]
    return Rows(rows | (group if patches else {}), places, lengths, following, image_patches)


def given_features(example: Example, config) -> int:
    """How many features an example takes from outside, such as imagined latents."""
    return int((example.feature_index >= len(example.patches) // config.vision.merge_unit).sum())


def next_position(example: Example) -> int:
    """M-RoPE position of the token after the prompt, which ends in text.

    A long video's temporal positions may reach further; `generate` of transformers counts on from the text as well.
    """
    return int(example.positions[0, -1]) + 1


def _frames(example: Example, channels: int) -> np.ndarray:
    """A still's patches, repeated over the frames of a batch that also holds video."""
    p, c = example.patches.shape
    return np.repeat(example.patches.reshape(p, 3, 1, -1), channels // c, axis=2).reshape(p, channels)
