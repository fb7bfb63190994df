"""config.json in every key style, against what transformers reads from the same file."""

import json

import pytest
from transformers import Qwen2_5_VLConfig

from latent_jax.config.training import PRESETS
from latent_jax.errors import UserError
from latent_jax.models.qwen2_5_vl.config import from_json
from tests.reference import checkpoints

# As published with Qwen2.5-VL-7B-Instruct: language fields at the top level, `rope_scaling`, `in_chans`.
PUBLISHED = {
    "model_type": "qwen2_5_vl",
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "use_sliding_window": False,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "vocab_size": 152064,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "vision_config": {
        "depth": 32,
        "hidden_act": "silu",
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "in_chans": 3,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    },
}


def assert_as_transformers(source: dict):
    ours, theirs = from_json(source), Qwen2_5_VLConfig(**source)
    text, vision = theirs.text_config, theirs.vision_config
    for name in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "rms_norm_eps",
    ):
        assert getattr(ours.text, name) == getattr(text, name), name
    assert ours.text.head_size == text.hidden_size // text.num_attention_heads
    assert ours.text.rope_theta == text.rope_parameters["rope_theta"]
    assert list(ours.text.mrope_section) == list(text.rope_parameters["mrope_section"])
    assert ours.text.tie_word_embeddings == theirs.tie_word_embeddings
    for name in (
        "depth",
        "hidden_size",
        "intermediate_size",
        "num_heads",
        "patch_size",
        "temporal_patch_size",
        "spatial_merge_size",
        "window_size",
        "out_hidden_size",
        "in_channels",
        "tokens_per_second",
    ):
        assert getattr(ours.vision, name) == getattr(vision, name), name
    assert list(ours.vision.fullatt_block_indexes) == list(vision.fullatt_block_indexes)
    for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
        assert getattr(ours, name) == getattr(theirs, name), name


def test_published_style():
    assert_as_transformers(PUBLISHED)
    found = from_json(PUBLISHED)
    assert (found.text.head_size, found.vision.head_size) == (128, 80)
    assert (found.vision.window_patches, found.vision.merge_unit) == (64, 4)
    assert found.vision.tokens_per_second == 2


@pytest.mark.parametrize("preset", sorted(path.name for path in PRESETS.glob("*.json")))
def test_presets(preset):
    assert_as_transformers(json.loads((PRESETS / preset).read_text()))


@pytest.mark.parametrize("name", checkpoints.SHAPES)
def test_what_transformers_writes_today(name, tmp_path):
    made = checkpoints.config(name)
    made.save_pretrained(tmp_path)
    assert_as_transformers(json.loads((tmp_path / "config.json").read_text()))
    assert from_json(tmp_path / "config.json") == from_json(made.to_dict())


@pytest.mark.parametrize(
    "absent", ["tie_word_embeddings", "num_key_value_heads", "rms_norm_eps", "rope_theta", "vision_start_token_id"]
)
def test_defaults_of_what_is_absent(absent):
    source = {key: value for key, value in PUBLISHED.items() if key != absent}
    if absent == "num_key_value_heads":  # transformers 5 says 8 here, no published file leaves it out
        assert from_json(source).text.num_key_value_heads == 28
    else:
        assert_as_transformers(source)


@pytest.mark.parametrize("absent", ["tokens_per_second", "window_size", "fullatt_block_indexes", "temporal_patch_size"])
def test_defaults_of_what_the_vision_config_lacks(absent):
    vision = {key: value for key, value in PUBLISHED["vision_config"].items() if key != absent}
    assert_as_transformers({**PUBLISHED, "vision_config": vision})


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"model_type": "qwen2_vl"}, "qwen2_5_vl"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"image_token_id": 2**23}, "image_token_id is 8388608, expected less than vocab_size"),
        ({"vision_end_token_id": 2**23}, "vision_end_token_id is 8388608, expected less than vocab_size"),
        ({"hidden_size": None}, "hidden_size"),
        ({"image_token_id": None}, "image_token_id"),
        ({"vision_config": None}, "vision_config"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_scaling": {"type": "yarn", "mrope_section": [16, 24, 24]}}, "yarn"),
        ({"rope_scaling": {"type": "mrope"}}, "mrope_section"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 23]}}, "mrope_section"),
        ({"num_key_value_heads": 5}, "num_key_value_heads 5"),
        ({"vision_config": {**PUBLISHED["vision_config"], "window_size": 113}}, "window_size 113"),
        ({"vision_config": {**PUBLISHED["vision_config"], "num_heads": 640}}, "num_heads 640"),
        ({"vision_config": {**PUBLISHED["vision_config"], "hidden_act": "gelu"}}, "vision_config.hidden_act"),
    ],
)
def test_what_we_do_not_compute_is_refused_by_name(change, word):
    with pytest.raises(UserError, match=word) as caught:
        from_json({**PUBLISHED, **change})
    assert "\n" not in str(caught.value)


def test_files_that_are_no_config_are_named(tmp_path):
    with pytest.raises(UserError, match="nowhere.json"):
        from_json(tmp_path / "nowhere.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json: .* cannot be read as JSON"):
        from_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(UserError, match="config.json"):
        from_json(tmp_path / "config.json")
