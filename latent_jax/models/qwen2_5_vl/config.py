"""Qwen2.5-VL's shape, read from an HF config.json in the published and in the current key style."""

import dataclasses
import json
from pathlib import Path

from latent_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The vision tower (HF Qwen2_5_VLVisionConfig). Sizes are in pixels for patch_size and window_size."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    window_size: int
    fullatt_block_indexes: tuple[int, ...]
    out_hidden_size: int
    in_channels: int = 3
    tokens_per_second: float = 4.0

    def __post_init__(self):
        if self.hidden_size % self.num_heads or (self.hidden_size // self.num_heads) % 4:
            raise UserError(
                f"vision_config: hidden_size {self.hidden_size} over num_heads {self.num_heads} must give "
                "a head size that is a multiple of 4 (row and column angles, each in pairs)"
            )
        if self.window_size % (self.patch_size * self.spatial_merge_size):
            raise UserError(
                f"vision_config.window_size {self.window_size} must be a multiple of patch_size * "
                f"spatial_merge_size = {self.patch_size * self.spatial_merge_size}"
            )

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def merge_unit(self) -> int:
        """Patches under one merged token."""
        return self.spatial_merge_size**2

    @property
    def window_patches(self) -> int:
        """Most patches that one attention window holds."""
        return (self.window_size // self.patch_size) ** 2


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The language model (HF Qwen2_5_VLTextConfig)."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_size: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]
    tie_word_embeddings: bool

    def __post_init__(self):
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"num_attention_heads {self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if 2 * sum(self.mrope_section) != self.head_size:
            raise UserError(f"mrope_section {list(self.mrope_section)} must sum to half the head size {self.head_size}")


@dataclasses.dataclass(frozen=True)
class Config:
    """A Qwen2.5-VL model: both towers and the token ids that tie them together."""

    text: TextConfig
    vision: VisionConfig
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    # What the image processor normalises by; preprocessor_config.json may say otherwise (these are CLIP's).
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)


def from_json(source: dict | str | Path) -> Config:
    """Reads a config.json (a path or its parsed content), whichever key style wrote it.

    Published checkpoints keep the language model's fields at the top level and `rope_scaling`; transformers 5 nests
    them under `text_config` with `rope_parameters`. Raises UserError naming the missing or unsupported key.
    """
    if not isinstance(source, dict):
        path = Path(source)
        try:
            source = json.loads(path.read_text())
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; expected a Qwen2.5-VL config.json") from None
        except json.JSONDecodeError as problem:
            raise UserError(f"{path}: not JSON ({problem})") from None
        if not isinstance(source, dict):
            raise UserError(f"{path}: not a JSON object; expected a Qwen2.5-VL config.json")
    if source.get("model_type") != "qwen2_5_vl":
        raise UserError(f"config.json: model_type is {source.get('model_type')!r}, expected 'qwen2_5_vl'")
    return Config(
        text=_text(source),
        vision=_vision(source),
        image_token_id=_need(source, "image_token_id"),
        video_token_id=_need(source, "video_token_id"),
        vision_start_token_id=_either(source, source.get("text_config") or {}, "vision_start_token_id", 151652),
        vision_end_token_id=_either(source, source.get("text_config") or {}, "vision_end_token_id", 151653),
    )


def _either(first: dict, second: dict, key: str, default=None):
    value = first.get(key, second.get(key))
    return default if value is None else value


def _need(source: dict, key: str, where: str = "config.json"):
    if source.get(key) is None:
        raise UserError(f"{where}: key '{key}' is missing")
    return source[key]


def _text(source: dict) -> TextConfig:
    text = {**source, **(source.get("text_config") or {})}
    if text.get("use_sliding_window"):
        raise UserError("config.json: use_sliding_window is true, expected false as in every published Qwen2.5-VL")
    if text.get("hidden_act", "silu") != "silu":
        raise UserError(f"config.json: hidden_act is {text['hidden_act']!r}, expected 'silu'")
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) not in ("default", "mrope"):
        raise UserError(f"config.json: rope type {rope.get('rope_type', rope.get('type'))!r}, expected 'mrope'")
    heads = _need(text, "num_attention_heads")
    hidden = _need(text, "hidden_size")
    return TextConfig(
        vocab_size=_need(text, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=_need(text, "intermediate_size"),
        num_hidden_layers=_need(text, "num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=text.get("num_key_value_heads") or heads,
        head_size=text.get("head_dim") or hidden // heads,
        rms_norm_eps=text.get("rms_norm_eps", 1e-5),
        rope_theta=float(rope.get("rope_theta") or text.get("rope_theta") or 1e6),
        mrope_section=tuple(_need(rope, "mrope_section", "config.json: rope_scaling")),
        # The top level decides: transformers writes the tie there and leaves the nested default behind.
        tie_word_embeddings=bool(_either(source, source.get("text_config") or {}, "tie_word_embeddings", False)),
    )


def _vision(source: dict) -> VisionConfig:
    vision = _need(source, "vision_config")
    if vision.get("hidden_act", "silu") != "silu":
        raise UserError(f"config.json: vision_config.hidden_act is {vision['hidden_act']!r}, expected 'silu'")
    get = lambda key, default: default if vision.get(key) is None else vision[key]  # noqa: E731
    return VisionConfig(
        depth=get("depth", 32),
        hidden_size=_need(vision, "hidden_size", "config.json: vision_config"),
        intermediate_size=get("intermediate_size", 3420),
        num_heads=get("num_heads", 16),
        patch_size=get("patch_size", get("spatial_patch_size", 14)),
        temporal_patch_size=get("temporal_patch_size", 2),
        spatial_merge_size=get("spatial_merge_size", 2),
        window_size=get("window_size", 112),
        fullatt_block_indexes=tuple(get("fullatt_block_indexes", (7, 15, 23, 31))),
        out_hidden_size=get("out_hidden_size", 3584),
        in_channels=get("in_channels", get("in_chans", 3)),
        tokens_per_second=get("tokens_per_second", 4),
    )
