"""The name table: complete against stock transformers, and its layouts against index arithmetic."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_jax.models.qwen2_5_vl import hf_names
from latent_jax.models.qwen2_5_vl.config import from_json
from tests.models import tiny_hf


@pytest.fixture(scope="module")
def config():
    return from_json(tiny_hf.config(tied=False).to_dict())


def row(path):
    return next(weight for weight in hf_names.TABLE if weight.path == path)


@pytest.mark.parametrize("tied", [False, True])
def test_covers_every_tensor_of_stock_transformers(tied):
    ours = hf_names.published_shapes(from_json(tiny_hf.config(tied=tied).to_dict()))
    theirs = {hf_names.normalise(name): tuple(p.shape) for name, p in tiny_hf.model(tied=tied).named_parameters()}
    assert ours == theirs


def test_published_names_are_left_alone_and_newer_ones_mapped():
    assert hf_names.normalise("model.layers.3.mlp.up_proj.weight") == "model.layers.3.mlp.up_proj.weight"
    assert hf_names.normalise("model.visual.merger.ln_q.weight") == "visual.merger.ln_q.weight"
    assert hf_names.normalise("model.language_model.norm.weight") == "model.norm.weight"
    assert hf_names.normalise("lm_head.weight") == "lm_head.weight"


def test_shapes_are_those_of_the_architecture(config):
    shapes = hf_names.shapes(config)
    L, D, N, K, H, F, V = 3, 24, 6, 2, 4, 20, 72
    assert shapes["text.embed"] == shapes["text.lm_head"] == (V, D)
    assert shapes["text.blocks.q"] == (L, D, N, H)
    assert shapes["text.blocks.k_bias"] == (L, K, H)
    assert shapes["text.blocks.o"] == (L, N, H, D)
    assert shapes["text.blocks.down"] == (L, F, D)
    assert shapes["vision.patch"] == (2, 3 * 3 * 3, 16)
    assert shapes["vision.blocks.qkv"] == (2, 16, 3, 2, 8)
    assert shapes["vision.blocks.qkv_bias"] == (2, 3, 2, 8)
    assert shapes["vision.merger.fc1"] == (64, 64)
    assert shapes["vision.merger.fc2"] == (64, D)


# What HF computes with the published tensor w, element by element: y[out] = sum_in w[out, in] x[in].
LAYOUTS = {
    "text.blocks.q": lambda w, d, n, h: w[n * 4 + h, d],
    "text.blocks.k": lambda w, d, k, h: w[k * 4 + h, d],
    "text.blocks.v_bias": lambda w, k, h: w[k * 4 + h],
    "text.blocks.o": lambda w, n, h, d: w[d, n * 4 + h],
    "text.blocks.gate": lambda w, d, f: w[f, d],
    "text.blocks.down": lambda w, f, d: w[d, f],
    "text.embed": lambda w, v, d: w[v, d],
    "vision.patch": lambda w, t, c, d: w[d, c // 9, t, c // 3 % 3, c % 3],
    "vision.blocks.qkv": lambda w, d, three, n, h: w[(three * 2 + n) * 8 + h, d],
    "vision.blocks.qkv_bias": lambda w, three, n, h: w[(three * 2 + n) * 8 + h],
    "vision.blocks.proj": lambda w, n, h, d: w[d, n * 8 + h],
    "vision.merger.fc1": lambda w, i, o: w[o, i],
    "vision.merger.fc2": lambda w, i, o: w[o, i],
}


@pytest.mark.parametrize("path", LAYOUTS)
def test_layout_is_the_one_that_index_arithmetic_gives(path, config):
    weight, shape = row(path), row(path).published_shape(config)
    theirs = np.arange(np.prod(shape)).reshape(shape)
    ours = weight.to_ours(theirs, config)
    expected = [LAYOUTS[path](theirs, *index) for index in np.ndindex(ours.shape)]
    np.testing.assert_array_equal(ours.ravel(), expected)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_both_directions_undo_each_other_for_any_sizes(data):
    size = lambda low=1: data.draw(st.integers(low, 5))
    base = from_json(tiny_hf.config(tied=False).to_dict())
    K, half = size(), size()
    text = dataclasses.replace(
        base.text,
        vocab_size=size(),
        hidden_size=size(),
        intermediate_size=size(),
        num_attention_heads=K * size(),
        num_key_value_heads=K,
        head_size=2 * half,
        mrope_section=(half, 0, 0),
    )
    heads, patch = size(), size()
    vision = dataclasses.replace(
        base.vision,
        hidden_size=4 * heads,
        num_heads=heads,
        intermediate_size=size(),
        temporal_patch_size=size(),
        patch_size=patch,
        window_size=2 * patch,
        out_hidden_size=text.hidden_size,
    )
    ids = dict.fromkeys(("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"), 0)
    config = dataclasses.replace(base, text=text, vision=vision, **ids)
    for weight in hf_names.weights(config):
        theirs = np.random.default_rng(0).random(weight.published_shape(config), np.float32)
        ours = weight.to_ours(theirs, config)
        assert ours.shape == weight.shape(config)[weight.stacked :]
        np.testing.assert_array_equal(weight.to_published(ours, config), theirs)


def test_reordering_an_array_that_stays_whole_copies_nothing(config):
    theirs = np.zeros(row("text.blocks.q").published_shape(config), np.float32)
    assert np.shares_memory(row("text.blocks.q").to_ours(theirs, config), theirs)


def test_tensors_are_listed_once_and_layer_by_layer(config):
    names = [name for _, _, name in hf_names.published(config)]
    assert len(set(names)) == len(names)
    assert names[0] == "model.embed_tokens.weight"
    layers = [int(name.split(".")[2]) for name in names if name.startswith("model.layers.")]
    assert layers == sorted(layers)
    assert sorted(names) == sorted(name for weight in hf_names.weights(config) for name in weight.names(config))
