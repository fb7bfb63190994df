"""M-RoPE positions against stock transformers."""

import functools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

from latent_jax.data.positions import Grid, mrope

MERGE, TOKENS_PER_SECOND = 2, 2


def hf_positions(spans):
    """Spans are ints (text) or (kind, slices, rows, columns, seconds) in merged tokens."""
    types, grids, seconds = [], {1: [], 2: []}, []
    for span in spans:
        if isinstance(span, int):
            types += [0] * span
        else:
            kind, slices, rows, columns, second = span
            types += [kind] * (slices * rows * columns)
            grids[kind].append([slices, rows * MERGE, columns * MERGE])
            seconds += [second] if kind == 2 else []
    vision = SimpleNamespace(spatial_merge_size=MERGE, tokens_per_second=TOKENS_PER_SECOND)
    model = SimpleNamespace(
        config=SimpleNamespace(vision_config=vision),
        get_vision_position_ids=functools.partial(Qwen2_5_VLModel.get_vision_position_ids, None),
    )
    positions, _ = Qwen2_5_VLModel.get_rope_index(
        model,
        torch.zeros(1, len(types), dtype=torch.long),
        torch.tensor([types]),
        image_grid_thw=torch.tensor(grids[1]),
        video_grid_thw=torch.tensor(grids[2]),
        second_per_grid_ts=torch.tensor(seconds),
    )
    return positions[:, 0].numpy()


def ours(spans):
    return [
        span if isinstance(span, int) else Grid(*span[1:4], TOKENS_PER_SECOND * span[4] if span[0] == 2 else 1.0)
        for span in spans
    ]


VISUAL = st.one_of(
    st.tuples(st.just(1), st.just(1), st.integers(1, 5), st.integers(1, 5), st.just(1.0)),
    st.tuples(
        st.just(2), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.sampled_from([0.3, 1.0, 2.5, 1 / 12])
    ),
)


@given(st.lists(VISUAL, max_size=3), st.lists(st.integers(1, 6), min_size=4, max_size=4))
@settings(max_examples=60, deadline=None)
def test_equals_hf_rope_index(visuals, texts):
    spans = [texts[0]]
    for visual, text in zip(visuals, texts[1:], strict=False):
        spans += [visual, text]
    positions, end = mrope(ours(spans))
    expected = hf_positions(spans)
    np.testing.assert_array_equal(positions, expected)
    assert positions.dtype == np.int32 and end == expected[0, -1] + 1


@pytest.mark.parametrize("start", [0, 7])
def test_a_view_goes_on_where_the_trunk_ends(start):
    spans = [3, Grid(1, 2, 3), 2]
    whole, _ = mrope([start, *spans])
    view, end = mrope(spans, start)
    np.testing.assert_array_equal(view, whole[:, start:])
    assert end == start + 3 + 3 + 2
