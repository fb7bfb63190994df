"""What a choice of batch_shape reaches on other examples than it was made from."""

from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_jax.data import batch_shapes
from latent_jax.data.layout import Example
from latent_jax.data.packing import Size
from latent_jax.errors import UserError

COCO = {(640, 480): 45, (480, 640): 20, (640, 427): 15, (427, 640): 8, (500, 375): 7, (612, 612): 3, (640, 360): 2}


def coco_sizes(count, kind):
    """Lengths as of COCO at full size: captioned images, or captions alone with every fourth an image (pretraining)."""
    rng = np.random.default_rng(0)
    shapes = rng.permutation([shape for shape, share in COCO.items() for _ in range(share)])
    sizes = []
    for number in range(count):
        width, height = shapes[rng.integers(len(shapes))]
        merged = round(width / 28) * round(height / 28)
        words = int(np.clip(rng.normal(13, 3), 8, 40))
        shown = kind == "chat" or number % 4 == 0
        sizes.append(Size(merged + 40 + words if shown else words + 19, merged * 4, 16, 588, merged * 4))
    return sizes


@pytest.mark.parametrize("kind", ["chat", "pretrain"])
@pytest.mark.parametrize(("batch_size", "groups"), [(64, 8), (256, 8)])
def test_budgets_fill_on_a_coco_like_mix(kind, batch_size, groups):
    batch_shape = batch_shapes.choose(coco_sizes(512, kind), batch_size=batch_size, groups=groups, row_tokens=8192)
    reached = batch_shapes.fill(coco_sizes(2560, kind)[512:], batch_shape)
    pair = sorted((reached["tokens"], reached["patches"]))
    # Eight groups of eight examples leave no room to even out lengths; the targets are for real batch sizes.
    small = batch_size // groups < 16
    assert pair[1] >= (0.92 if small else 0.95) and pair[0] >= (0.85 if small else 0.90), (reached, batch_shape)
    assert reached["examples"] >= (0.90 if small else 0.94), (reached, batch_shape)


def test_budgets_of_uniform_images_waste_nothing():
    rng = np.random.default_rng(0)
    sizes = [Size(48 + int(rng.integers(8, 20)), 64, 16, 588, 64) for _ in range(300)]
    batch_shape = batch_shapes.choose(sizes, batch_size=64, groups=2, window_patches=64, row_tokens=512)
    reached = batch_shapes.fill(sizes * 4, batch_shape)
    assert reached["patches"] >= 0.95 and reached["tokens"] >= 0.90 and reached["examples"] >= 0.95
    assert batch_shape.image_patches == 64 and batch_shape.slots == 16 and batch_shape.examples == 32


@given(
    st.lists(st.tuples(st.integers(1, 300), st.integers(0, 100)), min_size=1, max_size=20),
    st.sampled_from([(1, 1, 1), (8, 2, 2), (16, 4, 1)]),
)
@settings(max_examples=5, deadline=None)
def test_chosen_budgets_are_divisible_and_hold_every_sampled_example(lengths, shape):
    sizes = [Size(tokens, merged * 4, 0, 588, merged * 4) for tokens, merged in lengths]
    batch_size, groups, micro = shape
    batch_shape = batch_shapes.choose(sizes, batch_size=batch_size, groups=groups, micro=micro, window_patches=16)
    assert batch_shape.tokens % 16 == 0 and batch_shape.patches % 16 == 0 and batch_shape.image_patches % 16 == 0
    assert batch_shape.patches >= batch_shape.image_patches >= max(size.patches for size in sizes)
    assert bool(batch_shape.patches) == any(size.patches for size in sizes), "no room for images that never come"
    assert batch_shape.tokens >= max(size.tokens for size in sizes)
    assert batch_shape.micro * batch_shape.groups * batch_shape.examples == batch_size


def test_choosing_needs_examples_and_a_batch_size_that_divides():
    with pytest.raises(UserError, match="multiple"):
        batch_shapes.choose([Size(5, 4, 0, 588, 4)], batch_size=6, groups=4)
    with pytest.raises(UserError, match="no example"):
        batch_shapes.choose([], batch_size=4)


@pytest.mark.parametrize(
    ("named", "examples"),
    [
        (dict(rows=1, tokens=4096), 12),
        (dict(rows=2, tokens=2048), 12),
        (dict(rows=8, tokens=600), 8),
        (dict(rows=8, tokens=4096), 64),
        (dict(tokens=1024), 64),
        (dict(tokens=600), 64),
        (dict(rows=3), 36),  # of row_tokens
        (dict(rows=16), 64),
        (dict(patches=8192), 8),
        (dict(rows=4, tokens=4096, patches=8192), 8),
        (dict(rows=1, tokens=4096, patches=65536), 12),
    ],
)
def test_what_is_named_stands_and_the_rest_goes_with_it(named, examples):
    sizes = [Size(320, 1024, 0, 588, 1024)] * 64
    batch_shape = batch_shapes.choose(
        sizes, batch_size=128, groups=2, row_tokens=4096, named={"image_patches": 0, **named}
    )
    assert all(getattr(batch_shape, name) == size for name, size in named.items())
    assert batch_shape.image_patches == 1024 and batch_shape.examples == 64
    held = batch_shapes.fill(sizes * 16, batch_shape)["examples"] * 64
    assert 0.9 * examples <= held <= examples
    rooms = {"patches": batch_shape.patches // 1024, "rows": batch_shape.rows * (batch_shape.tokens // 320)}
    for name, room in rooms.items():
        assert name in named or (name == "rows" and "tokens" in named) or room <= 1.2 * examples, name


def test_lengths_that_do_not_fill_a_named_row_get_rows_enough():
    sizes = coco_sizes(512, "chat")
    for named in (dict(tokens=768), dict(rows=8, tokens=768)):
        batch_shape = batch_shapes.choose(sizes, batch_size=256, groups=8, row_tokens=8192, named=named)
        reached = batch_shapes.fill(sizes, batch_shape)
        assert reached["patches"] >= 0.9 and (reached["examples"] >= 0.94 or "rows" in named), (reached, batch_shape)


def test_a_named_row_is_filled_by_the_examples_that_fit_it():
    sizes = [Size(100, 64, 0, 588, 64), Size(400, 512, 0, 588, 512)] * 32
    batch_shape = batch_shapes.choose(sizes, batch_size=64, row_tokens=1024, named=dict(rows=4, tokens=200))
    assert (batch_shape.rows, batch_shape.tokens, batch_shape.image_patches) == (4, 200, 64)
    assert batch_shape.patches == 8 * 64, batch_shape


@pytest.mark.parametrize(("name", "size", "least"), [("tokens", 300, 320), ("patches", 512, 1024)])
def test_a_size_that_no_example_fits_is_named(name, size, least):
    with pytest.raises(UserError, match=rf"config\.data\.{name}: got {size}, expected at least {least}, what the sm"):
        batch_shapes.choose([Size(320, 1024, 0, 588, 1024)], batch_size=4, named={name: size})


def _example(tokens, key):
    return mock.Mock(spec=Example, tokens=np.zeros(tokens, np.int32), key=key)


@pytest.mark.parametrize(
    ("lengths", "row_tokens", "max_bad", "left_out"),
    [
        ([50, 60, 7000, 40], 256, 0.05, [7000]),  # of few, one
        ([50, 60, 250, 40], 256, 0.05, []),  # none is longer than a row may be
        (
            [50] * 96 + [900, 800, 700, 600],
            256,
            0.03,
            [900, 800, 700],
        ),  # the rest is no exception: rows are made for it
        ([50, 7000], 256, 0.0, []),  # nothing may be skipped
        ([7000], 256, 0.05, []),  # all that there is
    ],
)
def test_rare_long_examples_do_not_set_the_rows_length(lengths, row_tokens, max_bad, left_out):
    sample = [_example(length, str(at)) for at, length in enumerate(lengths)]
    kept, long = batch_shapes.without_outliers(sample, row_tokens, max_bad)
    assert [len(example.tokens) for example in long] == left_out
    assert kept == [example for example in sample if example not in long]


@pytest.mark.parametrize(
    ("batch_size", "named"), [(2**20, {}), (4, {"tokens": 2**24, "rows": 2**10}), (4, {"patches": 2**26})]
)
def test_a_step_that_no_memory_holds_is_refused_before_it_is_tried(batch_size, named):
    with pytest.raises(UserError, match=r"config\.train\.batch_size: a step of .* GiB, .* hosts have 16\.0"):
        batch_shapes.choose([Size(100, 64, 16, 588, 64)], batch_size=batch_size, named=named, memory=2**34)
