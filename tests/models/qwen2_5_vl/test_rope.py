"""Rotary angles against float64 formulas and transformers' modules."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as hf

from latent_jax.models.qwen2_5_vl.rope import axial, mrope, rotate
from tests.reference import checkpoints

POSITIONS = np.stack([np.arange(40) * step % 700 for step in (1, 17, 29)])  # temporal, row and column all differ


@pytest.mark.parametrize("name", ["as_published", "last_full", "wide_window", "all_full"])
def test_mrope_equals_transformers(name):
    config = checkpoints.config(name).text_config
    cos, sin = hf.Qwen2_5_VLRotaryEmbedding(config)(torch.zeros(1), torch.tensor(POSITIONS)[:, None])
    size = config.hidden_size // config.num_attention_heads
    angles = mrope(
        jnp.asarray(POSITIONS[None]),
        size,
        config.rope_parameters["rope_theta"],
        tuple(config.rope_parameters["mrope_section"]),
    )
    for ours, theirs in ((jnp.cos(angles), cos), (jnp.sin(angles), sin)):
        np.testing.assert_allclose(ours[0], theirs[0, :, : size // 2], atol=2e-5)

    q = np.random.default_rng(0).normal(size=(1, 40, 3, size)).astype(np.float32)
    want, _ = hf.apply_rotary_pos_emb(*[torch.tensor(q).transpose(1, 2)] * 2, cos, sin)
    np.testing.assert_allclose(rotate(jnp.asarray(q), angles), want.transpose(1, 2), atol=1e-4)


def test_mrope_turns_each_section_with_its_axis():
    """In float64: frequency i turns with the axis that owns it."""
    sections, theta = (2, 3, 3), 1e4
    axis = np.repeat([0, 1, 2], sections)
    want = [[POSITIONS[axis[i], t] * theta ** (-i / 8) for i in range(8)] for t in range(40)]
    np.testing.assert_allclose(mrope(jnp.asarray(POSITIONS[None]), 16, theta, sections)[0], want, rtol=1e-6)


@pytest.mark.parametrize("name", ["as_published", "first_full_tied", "none_full_tied"])
def test_axial_equals_transformers(name):
    config = checkpoints.config(name).vision_config
    places = np.random.default_rng(0).integers(0, 90, (50, 2))
    cos, sin = hf.Qwen2_5_VLVisionRotaryEmbedding(config)(torch.zeros(1), torch.tensor(places))
    size = config.hidden_size // config.num_heads
    angles = axial(jnp.asarray(places[None]), size)
    assert angles.shape == (1, 50, size // 2)
    np.testing.assert_allclose(jnp.cos(angles)[0], cos[:, : size // 2], atol=2e-5)
    np.testing.assert_allclose(jnp.sin(angles)[0], sin[:, : size // 2], atol=2e-5)


def test_scores_depend_on_distances_only():
    """What a rotation is for; and text positions (three equal axes) are ordinary RoPE."""
    rng = np.random.default_rng(1)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, 16)), jnp.float32) for _ in range(2))

    def score(at, other):
        turned = [rotate(x, mrope(jnp.full((1, 3, 1), p), 16, 1e4, (2, 3, 3))) for x, p in ((q, at), (k, other))]
        return float((turned[0] * turned[1]).sum())

    assert score(3, 8) == pytest.approx(score(103, 108), abs=1e-4)
    assert score(3, 8) != pytest.approx(score(3, 9), abs=1e-2)


def test_angles_are_fp32_for_positions_that_bfloat16_rounds():
    angles = mrope(jnp.array([[[256, 257]] * 3]), 16, 1e6, (2, 3, 3))
    assert angles.dtype == jnp.float32
    assert float(angles[0, 1, 0]) == 257
    x = rotate(jnp.ones((1, 2, 1, 16), jnp.bfloat16), angles)
    assert x.dtype == jnp.bfloat16
    assert not np.array_equal(x[0, 0], x[0, 1])
