"""What no single field can know, mixtures of datasets and the shapes that ship with the package."""

import pytest

from latent_jax.assets import TINY_VL
from latent_jax.config import schema
from latent_jax.config.training import PRESETS, mixture
from latent_jax.errors import UserError
from latent_jax.models.qwen2_5_vl.config import from_json


@pytest.mark.parametrize(
    "dotted, message",
    [
        ({"train.accumulate": 5}, r"config\.train\.accumulate: got 5, expected a divisor of .*batch_size = 32"),
        ({"model.lora_rank": 4, "model.trainable": "all"}, r"config\.model\.lora_rank: got 4 with .*trainable=all"),
        ({"data.latent_cache": "c", "model.trainable": "all"}, r"config\.data\.latent_cache: got 'c', expected ''"),
        ({"hosts.coordinator": "a:1", "hosts.count": 2, "hosts.index": 2}, r"config\.hosts\.index: got 2 of .* = 2"),
        ({"hosts.coordinator": "a", "hosts.count": 2, "hosts.index": 0}, r"config\.hosts\.coordinator: got 'a'"),
        ({"hosts.count": 2}, r"config\.hosts\.count: got 2 without config\.hosts\.coordinator"),
        ({"hosts.index": 0}, r"config\.hosts\.index: got 0 without config\.hosts\.coordinator"),
        (
            {"hosts.coordinator": "a:65536", "hosts.count": 1, "hosts.index": 0},
            "config.hosts.coordinator: got 'a:65536'",
        ),
        (
            {"train.learning_rate": 1e39},
            r"learning_rate: got 1e\+39, which the float32 .*; expected a number >= 0",
        ),
        ({"train.learning_rate": 1e-46}, "learning_rate: got 1e-46, which the float32"),  # would train nothing
        ({"train.clip": 1e-40}, "config.train.clip: got 1e-40, which the float32"),
        ({"train.epsilon": 1e-60}, "config.train.epsilon: got 1e-60, which the float32"),
        ({"train.beta1": 1.0}, "config.train.beta1: got 1.0, expected a number >= 0 and < 1"),
        ({"train.beta2": 1 - 1e-12}, "config.train.beta2: got 0.999999999999, expected a number >= 0 and < 1"),
        ({"mesh.cpu_devices": 10**6}, r"config\.mesh\.cpu_devices: got 1000000, expected an integer in 1\.\.1024"),
        ({"data.rows": 10**9}, r"config\.data\.rows: got 1000000000, expected an integer in 0\.\.1048576"),
        ({"data.max_pixels": 10**12}, "config.data.max_pixels: got 1000000000000, expected an integer in"),
        ({"mesh.replica": -1}, r"config\.mesh: got .* at most one -1"),
        ({"mesh.tp": 0}, r"config\.mesh\.tp: got 0, expected an integer >= 1, or -1"),
        ({"data.min_pixels": 9, "data.max_pixels": 4}, r"config\.data\.min_pixels: got 9, expected at most .* = 4"),
        ({"data.name": "a:0.5,b:zero"}, r"config\.data\.name: got 'a:0\.5,b:zero'"),
        ({"model.preset": "qwen2_5_vl_8b"}, r"config\.model\.preset: got 'qwen2_5_vl_8b'.* mean 'qwen2_5_vl_"),
        ({"model.preset": "tiny"}, r"config\.model\.preset: 'tiny' is a shape without weights"),
    ],
)
def test_settings_that_do_not_go_together_are_one_line_that_names_the_key(dotted, message):
    config = schema.default()
    with pytest.raises(UserError, match=message) as raised:
        schema.override(config, [(key, str(value)) for key, value in dotted.items()])
        schema.resolve(config)
    assert "\n" not in str(raised.value)


def test_mixture_weights_sum_to_one():
    assert mixture("coco") == (("coco", 1.0),)
    assert mixture("a:3, b:1") == (("a", 0.75), ("b", 0.25))
    for wrong in ("", "a,,b", "a:0,b:1", "a,a", "a:-1", "a:inf"):
        with pytest.raises(UserError, match="config.data.name"):
            mixture(wrong)


# name: hidden, layers, heads, key/value heads, feed-forward, vocabulary, tied, vision feed-forward
PUBLISHED = {
    "qwen2_5_vl_3b": (2048, 36, 16, 2, 11008, 151936, True, 3420),
    "qwen2_5_vl_7b": (3584, 28, 28, 4, 18944, 152064, False, 3420),
    "qwen2_5_vl_32b": (5120, 64, 40, 8, 27648, 152064, False, 3456),
    "qwen2_5_vl_72b": (8192, 80, 64, 8, 29568, 152064, False, 3456),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_hold_the_published_shapes(name):
    config = from_json(PRESETS / f"{name}.json")
    text, vision = config.text, config.vision
    assert PUBLISHED[name] == (
        text.hidden_size, text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads,
        text.intermediate_size, text.vocab_size, text.tie_word_embeddings, vision.intermediate_size,
    )  # fmt: skip
    assert (text.head_size, text.mrope_section, text.rope_theta, text.rms_norm_eps) == (128, (16, 24, 24), 1e6, 1e-6)
    assert (vision.depth, vision.hidden_size, vision.num_heads, vision.window_size) == (32, 1280, 16, 112)
    assert (vision.fullatt_block_indexes, vision.tokens_per_second) == ((7, 15, 23, 31), 2)
    assert vision.out_hidden_size == text.hidden_size
    assert (config.image_token_id, config.vision_start_token_id) == (151655, 151652)


def test_the_tiny_preset_is_the_embedded_models_shape():
    assert from_json(PRESETS / "tiny.json") == from_json(TINY_VL / "config.json")
