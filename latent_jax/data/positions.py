"""M-RoPE positions of a sequence of text stretches and visual grids (HF Qwen2_5_VLModel.get_rope_index)."""

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Grid:
    """A visual stretch: merged tokens (slices, rows, columns), slices `interval` temporal positions apart."""

    slices: int
    rows: int
    columns: int
    interval: float = 1.0

    def __len__(self) -> int:
        return self.slices * self.rows * self.columns


def mrope(spans: Sequence[int | Grid], start: int = 0) -> tuple[np.ndarray, int]:
    """Positions (3, t) int32 of the spans laid end to end from `start`, and the position of the next text token.

    An int is that many text tokens, which count up alike on all three axes. A grid's tokens share its start and add
    slice, row and column; the next span starts past its longer *side*. Transformers 5 leaves the temporal axis out of
    that rule, so a long video's last slices may carry higher temporal positions than the text after it.
    """
    pieces = [np.zeros((3, 0), np.int32)]
    for span in spans:
        if isinstance(span, Grid):
            # float32, then cut, as torch does with an integer range times a float interval.
            time = (np.arange(span.slices, dtype=np.float32) * np.float32(span.interval)).astype(np.int32)
            axes = np.meshgrid(time, np.arange(span.rows), np.arange(span.columns), indexing="ij")
            pieces.append(np.stack(axes).reshape(3, -1).astype(np.int32) + np.int32(start))
            start += max(span.rows, span.columns)
        else:
            pieces.append(np.broadcast_to(np.arange(start, start + span, dtype=np.int32), (3, span)))
            start += span
    return np.concatenate(pieces, axis=1), start
