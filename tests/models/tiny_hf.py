"""Tiny random HF checkpoints made by stock transformers, and their tensors read by the safetensors package."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration


def config(*, tied: bool) -> Qwen2_5_VLConfig:
    """Every size that the layout can confuse is different from the others."""
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 72,
            "hidden_size": 24,
            "intermediate_size": 20,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "bos_token_id": None,
            "eos_token_id": None,
            "tie_word_embeddings": tied,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 1e6},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 28,
            "num_heads": 2,
            "patch_size": 3,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "window_size": 12,
            "fullatt_block_indexes": [1],
            "out_hidden_size": 24,
        },
        tie_word_embeddings=tied,
        image_token_id=68,
        video_token_id=69,
        vision_start_token_id=70,
        vision_end_token_id=71,
    )


def model(*, tied: bool, dtype: torch.dtype = torch.float32) -> Qwen2_5_VLForConditionalGeneration:
    torch.manual_seed(0)
    made = Qwen2_5_VLForConditionalGeneration(config(tied=tied))
    for parameter in made.parameters():  # norms start at 1 and biases at 0: any mix-up of them would go unseen
        torch.nn.init.normal_(parameter)
    return made.to(dtype)


def write(
    directory: Path,
    *,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    sharded: bool = False,
    new_names: bool = False,
) -> Path:
    """A checkpoint directory with a few small files beside the weights. Returns it."""
    options = {"max_shard_size": 8000} if sharded else {}
    model(tied=tied, dtype=dtype).save_pretrained(directory, save_original_format=not new_names, **options)
    (directory / "tokenizer_config.json").write_text('{"padding_side": "left"}')
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    return directory


def read(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, under the names in its files."""
    return {name: tensor for file in directory.glob("model*.safetensors") for name, tensor in load_file(file).items()}


def change(directory: Path, edit) -> None:
    """Rewrites a single-file checkpoint with `edit(tensors)` applied in place."""
    tensors = read(directory)
    edit(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def change_json(path: Path, edit) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Same names, dtypes, shapes and bytes."""
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype
        and a[name].shape == b[name].shape
        and torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8))
        for name in a
    )
