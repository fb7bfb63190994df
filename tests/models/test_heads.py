"""The latent head against its formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from latent_jax.models.heads import LatentHead, LatentVLM
from latent_jax.models.parameters import Structure
from latent_jax.models.qwen2_5_vl.model import Qwen2_5_VL
from tests.reference import latent, small

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


def test_statistics_travel_with_the_head_and_are_not_trained():
    vlm = nnx.eval_shape(lambda: Qwen2_5_VL(small.model_config(), rngs=nnx.Rngs(0)))
    structure = Structure.of(LatentVLM(vlm, head()))
    untrained = {path for path in structure.variables if not structure.trained(path)}
    assert untrained == {"head.mean", "head.scale"}


def test_scale_and_bias_of_the_alignment_start_where_they_are_told():
    made = LatentHead(S, D, Z, F, logit_scale=2.5, logit_bias=-10.0, rngs=nnx.Rngs(0))
    assert float(made.logit_scale[...]) == 2.5
    assert float(made.logit_bias[...]) == -10.0


def test_initial_predictions_are_small_and_differ_by_slot():
    made = LatentHead(S, D, 64, F, rngs=nnx.Rngs(3))
    out = np.asarray(made(jax.random.normal(jax.random.key(0), (200, D))))
    assert 0.1 < out.std() < 2
    slots = np.asarray(made.slots[...])
    assert np.abs(slots[0] - slots[1]).max() > 0.01
