"""The latent head against its formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from latent_jax.models.heads import LatentHead
from latent_jax.models.parameters import Structure
from tests.reference import latent

S, D, Z, F = 4, 12, 6, 10


def head(seed=0, **options) -> LatentHead:
    """Random in every parameter and statistic."""
    structure = Structure.of(LatentHead(S, D, Z, F, rngs=nnx.Rngs(0), **options))
    rng = np.random.default_rng(seed)
    arrays = {path: jnp.asarray(rng.normal(1, 0.3, structure.shape(path)), jnp.float32) for path in structure.variables}
    return structure.build(arrays)


def test_equals_the_formula():
    made, x = head(), np.random.default_rng(1).normal(size=(3, S, D))
    w = {path: np.asarray(array, np.float64) for path, array in Structure.of(made).arrays(made).items()}
    np.testing.assert_allclose(jax.jit(made)(jnp.asarray(x, jnp.float32)), latent.head(w, x), rtol=1e-4, atol=1e-4)


def test_predictions_are_fp32_whatever_the_hidden_states_are():
    made = head()
    assert made(jnp.zeros((2, D), jnp.bfloat16)).dtype == jnp.float32
    assert made.standardise(jnp.zeros((2, Z), jnp.bfloat16)).dtype == jnp.float32


def test_standardise_centres_and_scales_and_restore_undoes_it():
    made, z = head(), np.random.default_rng(2).normal(3, 2, (5, S, Z)).astype(np.float32)
    standard = made.standardise(jnp.asarray(z))
    np.testing.assert_allclose(standard, (z - np.asarray(made.mean[...])) / np.asarray(made.scale[...]), rtol=1e-5)
    np.testing.assert_allclose(made.unstandardise(standard), z, rtol=1e-5)


def test_statistics_are_restored_with_the_head_and_are_not_trained():
    made = head()
    structure = Structure.of(made)
    assert {path for path in structure.variables if not structure.trained(path)} == {"mean", "scale"}
    arrays = {path: array + 1 for path, array in structure.arrays(made).items()}
    z = np.random.default_rng(4).normal(size=(3, Z)).astype(np.float32)
    expected = (z - np.asarray(made.mean[...]) - 1) / (np.asarray(made.scale[...]) + 1)
    np.testing.assert_allclose(structure.build(arrays).standardise(jnp.asarray(z)), expected, rtol=1e-5)


def test_weight_decay_is_for_the_matrices_alone():
    structure = Structure.of(LatentHead(S, D, Z, F, logit_scale=2.5, logit_bias=-10.0, rngs=nnx.Rngs(0)))
    trained = {path for path in structure.variables if structure.trained(path)}
    assert {path for path in trained if structure.decayed(path)} == {"fc1", "fc2"}
    assert {"slots", "norm", "logit_scale", "logit_bias"} < trained


def test_initial_weights_have_the_standard_deviation_of_their_fan_in():
    wide = LatentHead(64, 256, 128, 512, rngs=nnx.Rngs(3))
    for name, fan_in in (("slots", 256), ("fc1", 256), ("fc2", 512)):
        assert np.asarray(getattr(wide, name)[...]).std() * fan_in**0.5 == pytest.approx(1, rel=0.03), name
    # Unit-variance inputs, GELU halves the power (E[gelu(x)^2] = 0.4252 for a standard normal x).
    out = np.asarray(wide(jax.random.normal(jax.random.key(0), (200, 256))))
    assert out.std() == pytest.approx(0.4252**0.5, rel=0.1)
