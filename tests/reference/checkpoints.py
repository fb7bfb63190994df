"""Random Qwen2.5-VL checkpoints of many shapes, made and saved by stock transformers, with a tokenizer beside them."""

import functools
import json
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from latent_jax.assets import TINY_VL

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.json",
    "preprocessor_config.json",
    "generation_config.json",
)
# Padded past the tokenizer's, as the published vocabularies are.
VOCABULARY = 640

# Every shape differs from the others in what a port can get wrong: the windows, where full attention stands, head
# sizes, grouped heads, the sections of M-RoPE, tied embeddings.
SHAPES = {
    "as_published": dict(heads=(2, 1, 64), sections=(8, 12, 12), vision=(2, 64), window=112, full=(1,), depth=3),
    "first_full_tied": dict(heads=(2, 2, 80), sections=(16, 12, 12), vision=(1, 80), window=56, full=(0,), tied=True),
    "last_full": dict(heads=(1, 1, 128), sections=(16, 24, 24), vision=(2, 32), window=168, full=(2,), depth=3),
    "none_full_tied": dict(heads=(4, 2, 16), sections=(2, 3, 3), vision=(1, 128), window=56, full=(), tied=True),
    "all_full": dict(heads=(4, 1, 16), sections=(4, 2, 2), vision=(2, 64), window=112, full=(0, 1)),
    "wide_window": dict(
        heads=(6, 3, 16), sections=(2, 3, 3), vision=(3, 16), window=168, full=(0, 2), depth=3, theta=1e4
    ),
    "two_wide_heads": dict(heads=(2, 1, 128), sections=(16, 24, 24), vision=(2, 80), window=112, full=(1,), tied=True),
    "small_patches": dict(heads=(2, 1, 32), sections=(4, 6, 6), vision=(2, 16), window=48, full=(1,), patch=8),
    "merge_four": dict(heads=(2, 2, 32), sections=(8, 4, 4), vision=(2, 16), window=112, full=(1,), merge=4),
    "deep": dict(heads=(4, 2, 16), sections=(2, 3, 3), vision=(2, 16), window=112, full=(1, 3), depth=4, layers=4),
}


@functools.cache
def token_ids() -> dict[str, int]:
    """The ids of the embedded tokenizer's special tokens."""
    added = json.loads((TINY_VL / "tokenizer.json").read_text())["added_tokens"]
    return {token["content"]: token["id"] for token in added}


def config(name: str) -> Qwen2_5_VLConfig:
    shape, ids = SHAPES[name], token_ids()
    query_heads, key_heads, head_size = shape["heads"]
    vision_heads, vision_head_size = shape["vision"]
    hidden, tied = query_heads * head_size, shape.get("tied", False)
    return Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=VOCABULARY,
            hidden_size=hidden,
            intermediate_size=hidden + 24,
            rms_norm_eps=1e-5,
            num_hidden_layers=shape.get("layers", 2),
            num_attention_heads=query_heads,
            num_key_value_heads=key_heads,
            max_position_embeddings=4096,
            bos_token_id=None,
            eos_token_id=None,
            rope_parameters=dict(
                rope_type="default", rope_theta=shape.get("theta", 1e6), mrope_section=list(shape["sections"])
            ),
        ),
        vision_config=dict(
            depth=shape.get("depth", 2),
            hidden_size=vision_heads * vision_head_size,
            num_heads=vision_heads,
            intermediate_size=vision_heads * vision_head_size + 20,
            patch_size=shape.get("patch", 14),
            temporal_patch_size=2,
            spatial_merge_size=shape.get("merge", 2),
            window_size=shape["window"],
            fullatt_block_indexes=list(shape["full"]),
            out_hidden_size=hidden,
            tokens_per_second=2,
        ),
        tie_word_embeddings=tied,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )


def model(name: str, seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    """Random weights of a size at which every layer and every bias matters to the logits."""
    torch.manual_seed(seed)
    made = Qwen2_5_VLForConditionalGeneration(config(name)).float().eval()
    with torch.no_grad():
        for parameter_name, parameter in made.named_parameters():
            if parameter.dim() == 1:
                is_norm = "norm" in parameter_name or "ln_q" in parameter_name
                parameter.normal_(1.0 if is_norm else 0.0, 0.2)
            elif "embed_tokens" in parameter_name:
                # Small beside what the layers add: tied, large ones would predict the last token again and again.
                parameter.normal_(0.0, 0.2)
            else:
                parameter.normal_(0.0, 1.2 * parameter[0].numel() ** -0.5)
    return made


@functools.cache
def saved(name: str, seed: int = 0) -> tuple[Path, Qwen2_5_VLForConditionalGeneration]:
    """The checkpoint's directory, as `save_pretrained` and a tokenizer leave it, and the model in it. Do not change."""
    directory = Path(tempfile.mkdtemp(prefix=f"latent_jax_{name}_"))
    made = model(name, seed)
    write(made, directory)
    return directory, made


def write(made: Qwen2_5_VLForConditionalGeneration, directory: Path) -> Path:
    """Saves a model with tokenizer and processor files; its generation_config.json is the tokenizer's."""
    made.save_pretrained(directory)
    for name in TOKENIZER_FILES:
        shutil.copy(TINY_VL / name, directory)
    vision = made.config.vision_config
    side = vision.patch_size * vision.spatial_merge_size
    edit_json(
        directory / "preprocessor_config.json",
        patch_size=vision.patch_size,
        merge_size=vision.spatial_merge_size,
        min_pixels=side**2,
        max_pixels=224 * 224,
    )
    return directory


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
