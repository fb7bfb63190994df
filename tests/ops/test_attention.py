"""Attention against a loop over pairs in float64: packed rows with views, and blocks over ragged runs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_jax.ops.attention import block_attention, masked_attention, packed_mask
from tests.reference.ours import QUICK


def dense(q, k, v, mask):
    """Softmax attention of (T, N, H) against (U, K, H), float64; rows that see nothing are left out of comparisons."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    out = np.zeros_like(q)
    for t in range(len(q)):
        for n in range(q.shape[1]):
            keys = np.flatnonzero(mask[t])
            scores = k[keys, n // group] @ q[t, n] / np.sqrt(q.shape[-1])
            weights = np.exp(scores - scores.max())
            out[t, n] = (weights / weights.sum()) @ v[keys, n // group]
    return out


def random(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.booleans(), st.booleans()), min_size=12, max_size=12)
)
def test_packed_mask_is_the_rule_of_segments_views_and_hidden_keys(ids):
    segments, views, hidden, late = np.array(ids, np.int32).T
    rows = [jnp.asarray(each[None]) for each in (segments, views, hidden > 0, late > 0)]
    plain, found = (np.asarray(packed_mask(*rows[:count]))[0, 0] for count in (2, 4))
    for query in range(len(ids)):
        for key in range(len(ids)):
            sees = key <= query and segments[key] == segments[query] and views[key] in (0, views[query])
            assert plain[query, key] == sees, (query, key)
            assert found[query, key] == (sees and not (late[query] and hidden[key])), (query, key)


@pytest.mark.parametrize(("N", "K", "H"), [(4, 2, 8), (3, 1, 16), (2, 2, 80), (1, 1, 128)])
def test_masked_attention_equals_the_loop(N, K, H):
    T = 11
    q, k, v = random((T, N, H), (T, K, H), (T, K, H))
    mask = np.tril(np.random.default_rng(1).random((T, T)) < 0.6) | np.eye(T, dtype=bool)
    found = masked_attention(q[None], k[None], v[None], jnp.asarray(mask[None, None]))[0]
    np.testing.assert_allclose(found, dense(q, k, v, mask), atol=1e-5)


def test_softmax_is_fp32_where_inputs_are_bfloat16():
    """Scores of 60 apart by less than a bfloat16 step: rounding them to it would move the weights by a fifth."""
    q = jnp.full((1, 1, 1, 4), 8.0, jnp.bfloat16)
    k = jnp.asarray([[[15.0]], [[15.0625]]], jnp.bfloat16).reshape(1, 2, 1, 1) * jnp.array([1, 0, 0, 0], jnp.bfloat16)
    v = jnp.asarray([0.0, 1.0], jnp.bfloat16).reshape(1, 2, 1, 1) * jnp.ones(4, jnp.bfloat16)
    found = float(masked_attention(q, k, v, jnp.ones((1, 1, 1, 2), bool))[0, 0, 0, 0])
    assert abs(found - 1 / (1 + np.exp(-0.25))) < 0.005


def test_trunk_repeated_equals_shared_trunk():
    """Three views that share a trunk, against one segment a view with the trunk's keys repeated."""
    trunk, lengths, N, K, H = 5, (3, 4, 2), 4, 2, 8
    T = trunk + sum(lengths)
    q, k, v = random((T, N, H), (T, K, H), (T, K, H))
    views = np.repeat(np.arange(4, dtype=np.int32), [trunk, *lengths])
    mask = packed_mask(jnp.ones((1, T), jnp.int32), jnp.asarray(views[None]))
    shared = masked_attention(q[None], k[None], v[None], mask)[0]
    index = np.concatenate([np.r_[:trunk, np.flatnonzero(views == view)] for view in (1, 2, 3)])
    segments = np.repeat(np.arange(1, 4, dtype=np.int32), [trunk + length for length in lengths])
    mask = packed_mask(jnp.asarray(segments[None]), jnp.zeros((1, len(segments)), jnp.int32))
    repeated = masked_attention(q[index][None], k[index][None], v[index][None], mask)[0]
    np.testing.assert_allclose(repeated, np.asarray(shared)[index], atol=1e-6)


P, BLOCKS = 29, (2, 7, 10)


@functools.cache
def block_program(block: int):
    """(out, gradients) of block_attention and of masked softmax over everything, by one compiled program a block."""

    def ours(q, k, v, ids):
        return block_attention(q, k, v, ids, block)

    def reference(q, k, v, ids):
        scores = jnp.einsum("gpnh,gunh->gnpu", q, k) / np.sqrt(q.shape[-1])
        own = ids[:, None, :, None] == ids[:, None, None]
        return jnp.einsum("gnpu,gunh->gpnh", jax.nn.softmax(jnp.where(own, scores, -jnp.inf)), v)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(q, k, v, ids, cotangent):
        pairs = [jax.vjp(lambda q, k, v, f=f: f(q, k, v, ids), q, k, v) for f in (ours, reference)]
        return [(out, back(cotangent)) for out, back in pairs]

    return run


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(BLOCKS).flatmap(
        lambda block: st.tuples(st.just(block), st.lists(st.integers(1, block), min_size=1, max_size=P))
    )
)
def test_block_attention_equals_dense_forward_and_gradient(case):
    """Ragged runs up to a block long, padding behind them; P is a multiple of no block."""
    block, runs = case
    ids = np.repeat(np.arange(1, len(runs) + 1), runs)[:P]
    ids = np.pad(ids, (0, P - len(ids))).astype(np.int32)
    real = ids > 0
    q, k, v, cotangent = random(*[(1, P, 2, 4)] * 4)
    cotangent = jnp.where(real[:, None, None], cotangent, 0)
    (found, gradients), (_, wanted) = block_program(block)(q, k, v, jnp.asarray(ids[None]), cotangent)
    np.testing.assert_allclose(found[0][real], dense(q[0], k[0], v[0], ids[:, None] == ids)[real], atol=1e-5)
    assert np.isfinite(found).all()
    for gradient, want in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(gradient, want, atol=1e-5)
        assert not np.asarray(gradient)[0, ~real].any(), "padding has a gradient"
