"""adaptive_pool against torch's AdaptiveAvgPool2d on shuffled tokens of several images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_jax.losses.pooling import adaptive_pool

torch = pytest.importorskip("torch")
WIDTH, TOKENS = 3, 256
pool = jax.jit(adaptive_pool, static_argnames="side")


def visual_tokens(grids, padding, seed, dtype=np.float64):
    """The tokens of images 1, 2, ... with `padding` NaN tokens of image 0, in random order."""
    rng = np.random.default_rng(seed)
    images = [rng.normal(size=(*grid, WIDTH)).astype(dtype) for grid in grids]
    features = np.concatenate([image.reshape(-1, WIDTH) for image in images] + [np.full((padding, WIDTH), np.nan)])
    image_ids = np.concatenate([np.full(np.prod(grid), i + 1) for i, grid in enumerate(grids)] + [np.zeros(padding)])
    places = np.concatenate(
        [np.stack(np.indices(grid), -1).reshape(-1, 2) for grid in grids] + [np.zeros((padding, 2), int)]
    )
    order = rng.permutation(len(features))
    return images, features[order], image_ids[order].astype(np.int32), places[order].astype(np.int32)


def torch_pool(image, side):
    pooled = torch.nn.AdaptiveAvgPool2d(side)(torch.tensor(image, dtype=torch.float64).permute(2, 0, 1))
    return pooled.permute(1, 2, 0).reshape(side * side, -1).numpy()


@settings(max_examples=40, deadline=None)
@given(
    grids=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=3, max_size=3),
    side=st.sampled_from([1, 2, 3, 5, 7]),
    seed=st.integers(0, 99),
)
def test_matches_torch_on_any_grid(grids, side, seed):
    images, features, token_image, places = visual_tokens(grids, TOKENS - sum(r * c for r, c in grids), seed)
    wanted = [3, 0, 1, 2, 3]  # one image twice, none, and in an order of their own
    grid = np.array([grids[i - 1] if i else (0, 0) for i in wanted], np.int32)
    with jax.enable_x64(True):
        pooled = pool(features, token_image, places, np.array(wanted, np.int32), grid, side=side)
        assert pooled.dtype == jnp.float64
    for e, i in enumerate(wanted):
        reference = torch_pool(images[i - 1], side) if i else np.zeros((side * side, WIDTH))
        np.testing.assert_allclose(pooled[e], reference, rtol=1e-10, atol=1e-12)


def test_global_mean_drops_no_token():
    images, features, token_image, places = visual_tokens([(5, 7)], 2, 0)
    pooled = pool(features.astype(np.float32), token_image, places, np.array([1]), np.array([[5, 7]]), side=1)
    np.testing.assert_allclose(pooled[0, 0], images[0].mean(axis=(0, 1)), rtol=1e-5)


def test_padding_has_no_gradient_and_groups_can_be_vmapped():
    groups = [visual_tokens([(3, 4), (2, 5)], 4, seed) for seed in (0, 1)]
    stacked = [jnp.asarray(np.stack([g[i] for g in groups])) for i in (1, 2, 3)]
    image, grid = jnp.array([[2, 1], [1, 0]]), jnp.array([[[2, 5], [3, 4]], [[3, 4], [0, 0]]])
    pool_groups = jax.jit(jax.vmap(lambda *a: adaptive_pool(*a, 2)))
    pooled = pool_groups(stacked[0].astype(jnp.float32), *stacked[1:], image, grid)
    np.testing.assert_allclose(pooled[0, 0], torch_pool(groups[0][0][1], 2), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(pooled[1, 0], torch_pool(groups[1][0][0], 2), rtol=1e-4, atol=1e-6)
    assert not pooled[1, 1].any()
    gradient = jax.jit(jax.grad(lambda f: (pool_groups(f, *stacked[1:], image, grid) ** 2).sum()))(
        stacked[0].astype(jnp.float32)
    )
    assert np.isfinite(gradient).all()
    assert not gradient[stacked[1] == 0].any()


def test_bfloat16_features_are_averaged_in_float32():
    """256 + 1 + 1 + 1 is 256 when added up in bfloat16, and 259 has no bfloat16."""
    features = jnp.array([[256.0], [1.0], [1.0], [1.0]], jnp.bfloat16)
    places = jnp.array([[0, 0], [0, 1], [0, 2], [0, 3]])
    pooled = pool(features, jnp.ones(4, jnp.int32), places, jnp.array([1]), jnp.array([[1, 4]]), side=1)
    assert pooled.dtype == jnp.float32
    np.testing.assert_allclose(pooled[0, 0, 0], 259 / 4, rtol=1e-6)
