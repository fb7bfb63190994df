"""The language model alone: layers against transformers', the cache against the packed pass, packing and padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from latent_jax.models.qwen2_5_vl import cached
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
def packed(text, x, positions, segments, views, hidden=None, late=None, remat="none"):
    return text(x, positions, segments, views, hidden, late, collect=True, remat=remat)


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


@pytest.mark.parametrize(("listed", "covered"), [(True, False), (False, False), (True, True), (False, True)])
def test_the_cache_gives_what_the_packed_pass_gives(text, listed, covered, monkeypatch):
    """Prompts of three lengths packed in two rows, and a row without one; then the rest token by token.

    Where something is covered: prompts 0 and 1 hide a stretch from their last tokens and from all that follows.
    """
    monkeypatch.setattr(cached, "UNROLLED_LAYERS", 4 if listed else 3)
    # As of text, whose three axes agree: so it goes on from a prompt.
    x, where = inputs(3), jnp.broadcast_to(jnp.arange(T) + jnp.array([[[0]], [[3]], [[11]]]), (3, 3, T))
    lengths, starts = np.array([9, 14, 7, 0]), [(0, 0), (1, 2), (0, 12)]
    hidden, late = np.zeros((2, 3, T), bool)
    for prompt in range(2 * covered):
        hidden[prompt, 2:5], late[prompt, lengths[prompt] - 2 :] = True, True
    masks = [jnp.asarray(hidden), jnp.asarray(late)] if covered else []
    want, _ = packed(text, x, where, *one_segment(3), *masks)
    if covered:
        assert np.abs(want - packed(text, x, where, *one_segment(3))[0]).max() > 0.01, "nothing was hidden"
    laid = np.zeros((2, 2, T), bool)
    rows, at = np.full((2, T, 64), 100.0, np.float32), np.zeros((2, 3, T), np.int32)
    segments, places = np.zeros((2, T), np.int32), np.zeros((4, 16), np.int32)
    for prompt, (row, start) in enumerate(starts):
        span, size = slice(start, start + lengths[prompt]), lengths[prompt]
        rows[row, span], at[row, :, span] = x[prompt, :size], where[prompt, :, :size]
        segments[row, span], places[prompt, :size] = prompt + 1, row * T + np.arange(start, start + size)
        laid[:, row, span] = hidden[prompt, :size], late[prompt, :size]
    laid = list(laid) if covered else []
    # A new function each time: jit knows a function that it has seen, however the layers lay then.
    quick = lambda function: jax.jit(lambda *arguments: function(*arguments), compiler_options=ours.QUICK)
    hidden, prompts = quick(cached.prefill)(text, rows, at, segments, np.zeros_like(segments), places, lengths, *laid)
    real = quick(cached.seen)(places, lengths, *laid)
    assert isinstance(prompts, list) == listed
    close(hidden[:3], np.stack([want[prompt, lengths[prompt] - 1] for prompt in range(3)]))
    step, recent = quick(cached.step), cached.empty(text, 4, 12)
    for n in range(T - lengths.max()):
        now = [min(lengths[prompt] + n, T - 1) for prompt in range(3)]
        new = jnp.stack([x[prompt, now[prompt]] for prompt in range(3)] + [x[0, 0]])
        place = jnp.stack([where[prompt, 0, now[prompt]] for prompt in range(3)] + [jnp.int32(0)])
        places = jnp.broadcast_to(place[:, None], (len(place), 3))
        hidden, recent = step(text, cached.layers_of(text), new, places, prompts, real, recent, n)
        close(hidden[:3], np.stack([want[prompt, now[prompt]] for prompt in range(3)]))


def test_a_cache_laid_out_unlike_the_layers_is_refused(text, monkeypatch):
    monkeypatch.setattr(cached, "UNROLLED_LAYERS", 3)
    stacked = cached.empty(text, 1, 4)
    monkeypatch.setattr(cached, "UNROLLED_LAYERS", 4)
    layers, listed = cached.layers_of(text), cached.empty(text, 1, 4)
    one = jnp.zeros((1, 64)), jnp.zeros((1, 3), jnp.int32)
    real = jnp.ones((1, 4), bool)
    for prompts, recent in ((stacked, listed), (listed, stacked), (stacked, stacked)):
        with pytest.raises(ValueError, match="expected three lists, or all three stacked"):
            cached.step(text, layers, *one, prompts, real, recent, jnp.int32(0))


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
