"""Prompts laid out for the model to read at once: one a row, or packed; shapes are buckets that many batches share."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from latent_jax.data import packing
from latent_jax.data.layout import Example, Room

# Least sizes of a compiled program; larger ones grow by a third or a half, see bucket.
TOKENS, PATCHES = 32, 64


class PromptBatch(NamedTuple):
    """R prompts in B rows of T tokens, with the images of all of them in one group.

    `batch` has the keys and axes of one micro-step of training, with G = 1 and E = R; `number` is the prompt's index.
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


def one_per_row(examples: Sequence[Example], config: Any) -> PromptBatch:
    """Lays prompts out one a row; R and B are their number.

    Args:
      examples: laid-out prompts; the features of given Slots follow each other in their order.
      config: of the model.
    """
    T = bucket(max(len(e.tokens) for e in examples), TOKENS)
    R = len(examples)
    return _prompt_batch(examples, [(r, 0) for r in range(R)], (R, T), (R, T), config)


def packed(examples: Sequence[Example], config: Any) -> PromptBatch:
    """As one_per_row, several prompts a row where they fit: short ones do not pay for the longest. R, B, T and U are
    buckets."""
    U = bucket(max(len(e.tokens) for e in examples), TOKENS)
    tried = {T: _first_fit(examples, T) for T in (U, bucket(U + 1, TOKENS), 2 * U)}
    # Fewest tokens; then the shortest rows, since attention looks at whole rows.
    T = min(tried, key=lambda T: (bucket(1 + max(row for row, _ in tried[T])) * T, T))
    B = bucket(1 + max(row for row, _ in tried[T]))
    return _prompt_batch(examples, tried[T], (B, T), (bucket(len(examples)), U), config)


def _first_fit(examples: Sequence[Example], T: int) -> list[tuple[int, int]]:
    """(row, first token) of every example in rows of T tokens; the longest come first, short ones fill the rest."""
    longest_first = sorted(range(len(examples)), key=lambda number: -len(examples[number].tokens))
    places = packing.first_fit((len(examples[number].tokens) for number in longest_first), T)
    return [place for _, place in sorted(zip(longest_first, places, strict=True))]


def _prompt_batch(
    examples: Sequence[Example],
    starts: list[tuple[int, int]],
    shape: tuple[int, int],
    prompts: tuple[int, int],
    config: Any,
) -> PromptBatch:
    """Writes every example at its (row, token) into B rows of T tokens; `prompts` are R and U."""
    (B, T), (R, U) = shape, prompts
    batch_shape = _batch_shape(examples, B, T, R, config)
    batch = packing.empty(1, batch_shape)
    writer = packing.Writer({name: array[0] for name, array in batch.items()}, batch_shape)
    places, lengths, following = np.zeros((R, U), np.int32), np.zeros(R, np.int32), np.zeros(R, np.int32)
    for number, (example, (row, first)) in enumerate(zip(examples, starts, strict=True)):
        writer.write(example, row, first, number)
        lengths[number], following[number] = len(example.tokens), next_position(example)
        places[number] = row * T + first + np.minimum(np.arange(U), len(example.tokens) - 1)
    return PromptBatch(batch, places, lengths, following, batch_shape.image_patches)


def _batch_shape(examples: Sequence[Example], B: int, T: int, R: int, config: Any) -> packing.BatchShape:
    """Room for these prompts, in buckets."""
    unit, window = config.vision.merge_unit, config.vision.window_patches
    sizes = [packing.size_of(example) for example in examples]
    patches = sum(size.patches for size in sizes)
    return packing.BatchShape(
        micro=1,
        groups=1,
        rows=B,
        tokens=T,
        patches=bucket(patches, math.lcm(PATCHES, unit)) if patches else 0,
        examples=R,
        channels=max([size.channels for size in sizes if size.patches], default=1),
        image_patches=bucket(max([window, *(size.image_patches for size in sizes)]), window),
        merge_unit=unit,
        **{field.name: max(getattr(size, field.name) for size in sizes) for field in dataclasses.fields(Room)},
    )


def given_features(example: Example, config: Any) -> int:
    """How many features an example takes from outside, such as imagined latents."""
    return packing.given_features(example, config.vision.merge_unit)


def next_position(example: Example) -> int:
    """M-RoPE position of the token after the prompt, which ends in text.

    A long video's temporal positions may reach further; `generate` of transformers counts on from the text as well.
    """
    return int(example.positions[0, -1]) + 1
