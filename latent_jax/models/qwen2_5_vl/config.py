"""Qwen2.5-VL's shape, read from an HF config.json in the published and in the current key style."""

import dataclasses
import functools
from pathlib import Path

from latent_jax.config import fields
from latent_jax.errors import UserError
from latent_jax.runtime.files import read_json


def _number(low: float | None = None, high: float | None = None, above: float | None = None) -> dict[str, float | None]:
    """The range that a config.json may give a field; beyond it lies a slip or an attack, not a model."""
    return dict(low=low, high=high, above=above)


def _size(high: int) -> dict[str, float | None]:
    return _number(1, high)


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The vision tower (HF Qwen2_5_VLVisionConfig). Sizes are in pixels for patch_size and window_size."""

    depth: int = dataclasses.field(metadata=_size(1000))
    hidden_size: int = dataclasses.field(metadata=_size(2**17))
    intermediate_size: int = dataclasses.field(metadata=_size(2**20))
    num_heads: int = dataclasses.field(metadata=_size(2**12))
    patch_size: int = dataclasses.field(metadata=_size(1024))
    temporal_patch_size: int = dataclasses.field(metadata=_size(64))
    spatial_merge_size: int = dataclasses.field(metadata=_size(64))
    window_size: int = dataclasses.field(metadata=_size(2**20))
    fullatt_block_indexes: tuple[int, ...] = dataclasses.field(metadata=_number(0, 1000))
    out_hidden_size: int = dataclasses.field(metadata=_size(2**17))
    in_channels: int = dataclasses.field(default=3, metadata=dict(choices=(3,)))
    tokens_per_second: float = dataclasses.field(default=4.0, metadata=_number(above=0, high=10**6))

    def __post_init__(self) -> None:
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

    vocab_size: int = dataclasses.field(metadata=_size(2**24))
    hidden_size: int = dataclasses.field(metadata=_size(2**17))
    intermediate_size: int = dataclasses.field(metadata=_size(2**20))
    num_hidden_layers: int = dataclasses.field(metadata=_size(1000))
    num_attention_heads: int = dataclasses.field(metadata=_size(2**12))
    num_key_value_heads: int = dataclasses.field(metadata=_size(2**12))
    head_size: int = dataclasses.field(metadata=_size(2**13))
    rms_norm_eps: float = dataclasses.field(metadata=_number(0, 1))
    rope_theta: float = dataclasses.field(metadata=_number(above=0, high=10**12))
    mrope_section: tuple[int, int, int] = dataclasses.field(metadata=_number(0, 2**12))
    tie_word_embeddings: bool

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"num_attention_heads {self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if 2 * sum(self.mrope_section) != self.head_size:
            raise UserError(f"mrope_section {list(self.mrope_section)} must sum to half the head size {self.head_size}")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A Qwen2.5-VL model: both towers and the token ids that tie them together."""

    text: TextConfig
    vision: VisionConfig
    image_token_id: int = dataclasses.field(metadata=_number(0, 2**24))
    video_token_id: int = dataclasses.field(metadata=_number(0, 2**24))
    vision_start_token_id: int = dataclasses.field(metadata=_number(0, 2**24))
    vision_end_token_id: int = dataclasses.field(metadata=_number(0, 2**24))
    # What the image processor normalises by; preprocessor_config.json may say otherwise (these are CLIP's).
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self) -> None:
        if self.vision.out_hidden_size != self.text.hidden_size:
            raise UserError(
                f"vision_config.out_hidden_size is {self.vision.out_hidden_size}, expected the language model's "
                f"hidden_size {self.text.hidden_size}"
            )
        for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
            if getattr(self, name) >= self.text.vocab_size:
                raise UserError(
                    f"{name} is {getattr(self, name)}, expected less than vocab_size {self.text.vocab_size}"
                )


def from_json(source: dict | str | Path) -> ModelConfig:
    """Reads a config.json (a path or its parsed content), whichever key style wrote it.

    Published checkpoints keep the language model's fields at the top level and `rope_scaling`; transformers 5 nests
    them under `text_config` with `rope_parameters`. Raises UserError naming the file and the key that is missing,
    unsupported, of another type or out of its range.
    """
    where = "config.json" if isinstance(source, dict) else str(source)
    content = source if isinstance(source, dict) else read_json(source, expected="a Qwen2.5-VL config.json")
    try:
        return _config(content)
    except UserError as problem:
        raise UserError(f"{where}: {problem}") from None


def _config(source: dict) -> ModelConfig:
    if source.get("model_type") != "qwen2_5_vl":
        raise UserError(f"model_type is {fields.shown(source.get('model_type'))}, expected 'qwen2_5_vl'")
    if source.get("quantization_config"):
        raise UserError("quantization_config: a quantised checkpoint; expected the one that it was made from")
    ids = {**_section(source, "text_config"), **{key: value for key, value in source.items() if value is not None}}
    return ModelConfig(
        text=_text(source),
        vision=_vision(source),
        image_token_id=fields.read(ModelConfig, "image_token_id", source),
        video_token_id=fields.read(ModelConfig, "video_token_id", source),
        vision_start_token_id=fields.read(ModelConfig, "vision_start_token_id", ids, default=151652),
        vision_end_token_id=fields.read(ModelConfig, "vision_end_token_id", ids, default=151653),
    )


def _section(source: dict, key: str) -> dict:
    section = source.get(key)
    if section is not None and not isinstance(section, dict):
        raise UserError(f"{key} is {fields.shown(section)}, expected an object")
    return section or {}


def _silu(section: dict, inside: str = "") -> None:
    if section.get("hidden_act", "silu") != "silu":
        raise UserError(f"{inside}hidden_act is {fields.shown(section['hidden_act'])}, expected 'silu'")


def _text(source: dict) -> TextConfig:
    nested = _section(source, "text_config")
    text = {**source, **nested}
    if text.get("use_sliding_window"):
        raise UserError("use_sliding_window is true, expected false as in every published Qwen2.5-VL")
    _silu(text)
    rope = _section(text, "rope_parameters") or _section(text, "rope_scaling")
    style = rope.get("rope_type", rope.get("type", "default"))
    if style not in ("default", "mrope"):
        raise UserError(f"rope type {fields.shown(style)}, expected 'mrope'")
    read = functools.partial(fields.read, TextConfig, source=text)
    heads, hidden = read("num_attention_heads"), read("hidden_size")
    # The top level decides: transformers writes the tie there and leaves the nested default behind.
    tied = {**nested, **{key: value for key, value in source.items() if value is not None}}
    return TextConfig(
        vocab_size=read("vocab_size"),
        hidden_size=hidden,
        intermediate_size=read("intermediate_size"),
        num_hidden_layers=read("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=read("num_key_value_heads", default=heads),
        head_size=fields.read(TextConfig, "head_size", text, "head_dim", default=hidden // heads),
        rms_norm_eps=read("rms_norm_eps", default=1e-5),
        rope_theta=fields.read(TextConfig, "rope_theta", {**text, **rope}, default=1e6),
        mrope_section=fields.read(TextConfig, "mrope_section", rope, inside="rope_scaling."),
        tie_word_embeddings=fields.read(TextConfig, "tie_word_embeddings", tied, default=False),
    )


def _vision(source: dict) -> VisionConfig:
    vision, inside = _section(source, "vision_config"), "vision_config."
    if not vision:
        raise UserError("key 'vision_config' is missing")
    _silu(vision, inside)
    read = functools.partial(fields.read, VisionConfig, source=vision, inside=inside)
    return VisionConfig(
        depth=read("depth", default=32),
        hidden_size=read("hidden_size"),
        intermediate_size=read("intermediate_size", default=3420),
        num_heads=read("num_heads", default=16),
        patch_size=fields.read(
            VisionConfig, "patch_size", vision, "patch_size", "spatial_patch_size", default=14, inside=inside
        ),
        temporal_patch_size=read("temporal_patch_size", default=2),
        spatial_merge_size=read("spatial_merge_size", default=2),
        window_size=read("window_size", default=112),
        fullatt_block_indexes=read("fullatt_block_indexes", default=(7, 15, 23, 31)),
        out_hidden_size=read("out_hidden_size", default=3584),
        in_channels=fields.read(
            VisionConfig, "in_channels", vision, "in_channels", "in_chans", default=3, inside=inside
        ),
        tokens_per_second=read("tokens_per_second", default=4),
    )
