"""The one two-way table between our weights and the tensors of a Hugging Face Qwen2.5-VL checkpoint.

A row of the table says what a weight is called here and there and how its axes are laid out on both sides; loading and
export are both derived from it. Axes in parentheses are flattened into one, as einops writes them. A `{l}` in the
published name stands for the layer: our side stacks those tensors along a leading L axis, which the rows leave out.
"""

import dataclasses
import re
from collections.abc import Iterator
from math import prod

import numpy as np

from latent_jax.models.qwen2_5_vl.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Weight:
    """One row: our dotted path and axes, the published name and axes."""

    path: str
    ours: str
    name: str
    theirs: str

    @property
    def stacked(self) -> bool:
        """Whether our side stacks one published tensor per layer."""
        return "{l}" in self.name

    def names(self, config: ModelConfig) -> list[str]:
        """Published names, in layer order; one name where the weight is not stacked."""
        if not self.stacked:
            return [self.name]
        return [self.name.format(l=layer) for layer in range(_sizes(self.path, config)["L"])]

    def shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Shape on our side, with the leading L where layers are stacked."""
        sizes = _sizes(self.path, config)
        return (sizes["L"],) * self.stacked + _shape(self.ours, sizes)

    def published_shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Shape of each published tensor."""
        return _shape(self.theirs, _sizes(self.path, config))

    def to_ours(self, tensor: np.ndarray, config: ModelConfig) -> np.ndarray:
        """A published tensor (NumPy or JAX) in our axis order, without L. NumPy gives a view wherever one exists."""
        return _relayout(tensor, self.theirs, self.ours, _sizes(self.path, config))

    def to_published(self, tensor: np.ndarray, config: ModelConfig) -> np.ndarray:
        """The inverse of `to_ours`: one layer of our weight in the published axis order."""
        return _relayout(tensor, self.ours, self.theirs, _sizes(self.path, config))


_TEXT = (
    ("embed", "V D", "embed_tokens.weight", "V D"),
    ("blocks.attn_norm", "D", "layers.{l}.input_layernorm.weight", "D"),
    ("blocks.q", "D N H", "layers.{l}.self_attn.q_proj.weight", "(N H) D"),
    ("blocks.q_bias", "N H", "layers.{l}.self_attn.q_proj.bias", "(N H)"),
    ("blocks.k", "D K H", "layers.{l}.self_attn.k_proj.weight", "(K H) D"),
    ("blocks.k_bias", "K H", "layers.{l}.self_attn.k_proj.bias", "(K H)"),
    ("blocks.v", "D K H", "layers.{l}.self_attn.v_proj.weight", "(K H) D"),
    ("blocks.v_bias", "K H", "layers.{l}.self_attn.v_proj.bias", "(K H)"),
    ("blocks.o", "N H D", "layers.{l}.self_attn.o_proj.weight", "D (N H)"),
    ("blocks.mlp_norm", "D", "layers.{l}.post_attention_layernorm.weight", "D"),
    ("blocks.gate", "D F", "layers.{l}.mlp.gate_proj.weight", "F D"),
    ("blocks.up", "D F", "layers.{l}.mlp.up_proj.weight", "F D"),
    ("blocks.down", "F D", "layers.{l}.mlp.down_proj.weight", "D F"),
    ("norm", "D", "norm.weight", "D"),
)
# Of the merger's axes, C is the width of the joined patches, X (= C) the width between, O the text model's.
_VISION = (
    ("patch", "f (c y x) D", "patch_embed.proj.weight", "D c f y x"),
    ("blocks.norm1", "D", "blocks.{l}.norm1.weight", "D"),
    ("blocks.norm2", "D", "blocks.{l}.norm2.weight", "D"),
    ("blocks.qkv", "D 3 N H", "blocks.{l}.attn.qkv.weight", "(3 N H) D"),
    ("blocks.qkv_bias", "3 N H", "blocks.{l}.attn.qkv.bias", "(3 N H)"),
    ("blocks.proj", "N H D", "blocks.{l}.attn.proj.weight", "D (N H)"),
    ("blocks.proj_bias", "D", "blocks.{l}.attn.proj.bias", "D"),
    ("blocks.gate", "D F", "blocks.{l}.mlp.gate_proj.weight", "F D"),
    ("blocks.gate_bias", "F", "blocks.{l}.mlp.gate_proj.bias", "F"),
    ("blocks.up", "D F", "blocks.{l}.mlp.up_proj.weight", "F D"),
    ("blocks.up_bias", "F", "blocks.{l}.mlp.up_proj.bias", "F"),
    ("blocks.down", "F D", "blocks.{l}.mlp.down_proj.weight", "D F"),
    ("blocks.down_bias", "D", "blocks.{l}.mlp.down_proj.bias", "D"),
    ("merger.norm", "D", "merger.ln_q.weight", "D"),
    ("merger.fc1", "C X", "merger.mlp.0.weight", "X C"),
    ("merger.fc1_bias", "X", "merger.mlp.0.bias", "X"),
    ("merger.fc2", "X O", "merger.mlp.2.weight", "O X"),
    ("merger.fc2_bias", "O", "merger.mlp.2.bias", "O"),
)
TABLE = (
    *(Weight(f"text.{path}", ours, f"model.{name}", theirs) for path, ours, name, theirs in _TEXT),
    Weight("text.lm_head", "V D", "lm_head.weight", "V D"),
    *(Weight(f"vision.{path}", ours, f"visual.{name}", theirs) for path, ours, name, theirs in _VISION),
)
# transformers >= 4.52 names the towers after their place in its module tree.
_RENAMED = (("model.visual.", "visual."), ("model.language_model.", "model."))


def weights(config: ModelConfig) -> list[Weight]:
    """The rows that a model of this shape has: all of them, less the language model's head where it is tied."""
    return [weight for weight in TABLE if weight.path != "text.lm_head" or not config.text.tie_word_embeddings]


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Our path -> our shape (layers stacked) of every weight."""
    return {weight.path: weight.shape(config) for weight in weights(config)}


def published_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Published name -> shape of every tensor of the checkpoint, in the order in which an export writes them."""
    return {name: weight.published_shape(config) for weight, _, name in published(config)}


def published(config: ModelConfig) -> Iterator[tuple[Weight, int, str]]:
    """(row, layer, published name) of every tensor, layer by layer as the published checkpoints order them.

    The layer is 0 for a weight that is not stacked.
    """
    for tower in ("text.", "vision."):
        rows = [weight for weight in weights(config) if weight.path.startswith(tower)]
        stacked = [weight for weight in rows if weight.stacked]
        first = rows.index(stacked[0])
        for weight in rows[:first]:
            yield weight, 0, weight.name
        for layer in range(_sizes(tower, config)["L"]):
            for weight in stacked:
                yield weight, layer, weight.name.format(l=layer)
        for weight in rows[first + len(stacked) :]:
            yield weight, 0, weight.name


def normalise(name: str) -> str:
    """The published name of a tensor that transformers may have saved under its newer one."""
    for new, old in _RENAMED:
        if name.startswith(new):
            return old + name.removeprefix(new)
    return name


def _sizes(path: str, config: ModelConfig) -> dict[str, int]:
    """Axis letter -> size, for the tower that the path belongs to."""
    text, vision = config.text, config.vision
    if path.startswith("text."):
        return {
            "L": text.num_hidden_layers,
            "V": text.vocab_size,
            "D": text.hidden_size,
            "F": text.intermediate_size,
            "N": text.num_attention_heads,
            "K": text.num_key_value_heads,
            "H": text.head_size,
        }
    merged = vision.merge_unit * vision.hidden_size
    return {
        "L": vision.depth,
        "D": vision.hidden_size,
        "F": vision.intermediate_size,
        "N": vision.num_heads,
        "H": vision.head_size,
        "3": 3,
        "f": vision.temporal_patch_size,
        "c": vision.in_channels,
        "y": vision.patch_size,
        "x": vision.patch_size,
        "C": merged,
        "X": merged,
        "O": vision.out_hidden_size,
    }


def _groups(axes: str) -> list[list[str]]:
    """`"(N H) D"` -> `[["N", "H"], ["D"]]`."""
    return [group.strip("()").split() for group in re.findall(r"\([^)]*\)|\S+", axes)]


def _shape(axes: str, sizes: dict[str, int]) -> tuple[int, ...]:
    return tuple(prod(sizes[letter] for letter in group) for group in _groups(axes))


def _relayout(tensor: np.ndarray, source: str, target: str, sizes: dict[str, int]) -> np.ndarray:
    """Splits the source's flattened axes, reorders all axes, flattens those that the target flattens."""
    have = [letter for group in _groups(source) for letter in group]
    want = [letter for group in _groups(target) for letter in group]
    split = tensor.reshape([sizes[letter] for letter in have])
    return split.transpose([have.index(letter) for letter in want]).reshape(_shape(target, sizes))
