"""The language model alone: layers against transformers', the cache against the packed pass, packing and padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.reference import ours
from tests.reference.checkpoints import saved

NAME = "deep"
T = 24


@pytest.fixture(scope="module")
def text():
    return ours.load(saved(NAME)[0]).model.text


def positions(*starts) -> jax.Array:
    """(R, 3, T) with rows and columns that differ from time, as within an image."""
    base = np.stack([np.arange(T), np.arange(T) // 3, np.arange(T) % 5])
    return jnp.asarray(np.stack([base + start for start in starts]), jnp.int32)


def inputs(rows=2, seed=0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (rows, T, 64))


@functools.partial(jax.jit, static_argnames="remat", compiler_options=ours.QUICK)
def packed(text, x, positions, segments, views, remat="none"):
    return text(x, positions, segments, views, collect=True, remat=remat)


@functools.partial(jax.jit, compiler_options=ours.QUICK)
def cached(text, x, positions, cache, start, mask):
    return text.cached(x, positions, cache, start, mask)


def one_segment(rows=2):
    return jnp.ones((rows, T), jnp.int32), jnp.zeros((rows, T), jnp.int32)


def close(found, want):
    np.testing.assert_allclose(found, want, atol=1e-5 * float(np.abs(want).max()))


def test_every_layer_equals_transformers(text):
    _, model = saved(NAME)
    x, where = inputs(), positions(0, 7)
    hidden, layers = packed(text, x, where, *one_segment())
    with torch.no_grad():
        out = model.model.language_model(
            inputs_embeds=torch.tensor(np.asarray(x)),
            position_ids=torch.tensor(np.asarray(where)).transpose(0, 1),
            output_hidden_states=True,
        )
    close(hidden, out.last_hidden_state)
    for found, want in zip(layers[:-1], out.hidden_states[1:-1], strict=True):
        close(found, want)


def test_the_cache_gives_what_the_packed_pass_gives(text):
    """Prompts of two lengths at once, then the rest token by token, each row at its own place."""
    x, where = inputs(), positions(0, 3)
    want, _ = packed(text, x, where, *one_segment())
    lengths = np.array([9, 14])
    cache = text.empty_cache(2, T + 5)
    place = jnp.arange(T + 5)
    # The prefill runs over padding too: what it writes there must be overwritten or never seen.
    causal = jnp.broadcast_to(place <= jnp.arange(T)[:, None], (2, T, T + 5))
    garbage = jnp.where((jnp.arange(T) < lengths[:, None])[..., None], x, 100.0)
    hidden, cache = cached(text, garbage, where, cache, jnp.zeros(2, jnp.int32), causal)
    for row, length in enumerate(lengths):
        close(hidden[row, :length], want[row, :length])
    for step in range(T - lengths.max()):
        at = jnp.asarray(lengths + step)
        new = jnp.stack([x[row, at[row]][None] for row in range(2)])
        new_where = jnp.stack([where[row, :, at[row]][:, None] for row in range(2)])
        hidden, cache = cached(text, new, new_where, cache, at, (place <= at[:, None])[:, None])
        close(hidden[:, 0], np.stack([want[row, at[row]] for row in range(2)]))


def test_packed_examples_and_views_equal_each_alone(text):
    """Two examples in a row, the first with a trunk and two views, then padding."""
    x, where = inputs(1), positions(0)
    segments = jnp.asarray([[1] * 12 + [2] * 8 + [0] * 4])
    views = jnp.asarray([[0] * 4 + [1] * 3 + [2] * 5 + [0] * 12])
    together, _ = packed(text, x, where, segments, views)
    for keep in ([*range(7)], [*range(4), *range(7, 12)], [*range(12, 20)]):
        pad = keep + [0] * (T - len(keep))
        real = jnp.asarray([[1] * len(keep) + [0] * (T - len(keep))])
        alone, _ = packed(text, x[:, jnp.array(pad)], where[:, :, jnp.array(pad)], real, jnp.zeros((1, T), jnp.int32))
        close(together[0, jnp.array(keep)], np.asarray(alone)[0, : len(keep)])


def test_padding_is_never_seen(text):
    x, where = inputs(1), positions(0)
    segments = jnp.asarray([[0] * 5 + [1] * 15 + [0] * 4])
    views = jnp.zeros((1, T), jnp.int32)
    want, _ = packed(text, x, where, segments, views)
    found, _ = packed(text, jnp.where(segments[..., None] == 0, 1e3, x), where, segments, views)
    np.testing.assert_array_equal(np.asarray(found)[0, 5:20], np.asarray(want)[0, 5:20])
    assert np.isfinite(found).all()


def test_rematerialising_changes_no_gradient(text):
    x, where = inputs(), positions(0, 0)

    @functools.partial(jax.jit, static_argnums=1, compiler_options=ours.QUICK)
    @jax.grad
    def gradient(x, remat):
        return (text(x, where, *one_segment(), remat=remat)[0] ** 2).sum()

    want = np.asarray(gradient(x, "none"))
    for policy in ("dots", "full"):
        close(gradient(x, policy), want)


def test_tied_and_untied_heads():
    tied, untied = (ours.load(saved(name)[0]).model.text for name in ("first_full_tied", NAME))
    np.testing.assert_array_equal(tied.head, tied.embed[...])
    assert not hasattr(tied, "lm_head")
    np.testing.assert_array_equal(untied.head, untied.lm_head[...])
    assert not np.array_equal(untied.head, untied.embed[...])
