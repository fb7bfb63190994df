"""Qwen2.5-VL: the vision tower, the language model, and how visual tokens enter its input."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from latent_jax.models.qwen2_5_vl.config import ModelConfig
from latent_jax.models.qwen2_5_vl.text import TextDecoder
from latent_jax.models.qwen2_5_vl.vision import VisionTower
from latent_jax.ops import partition

# Merged visual tokens (the language model's D is the tower's O), patch features before the merger, block outputs.
Encoded = tuple[Float[Array, "G M O"], Float[Array, "G P D"], Float[Array, "L G P D"] | None]


class Qwen2_5_VL(nnx.Module):
    """The whole model.

    Args:
      config: its shape.
      rngs: source of the initial values.
      dtype: of the weights; a loaded checkpoint replaces them.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        self.config = config
        self.vision = VisionTower(config.vision, rngs, dtype)
        self.text = TextDecoder(config.text, rngs, dtype)

    def encode(self, batch: dict[str, Array], *, image_patches: int, **options: Any) -> Encoded:
        """Encodes a group-packed batch's images; see VisionTower for what comes back."""
        return encode(self.vision, self.config, batch, image_patches=image_patches, **options)

    def embed(
        self,
        tokens: Int[Array, "G B T"],
        feature_index: Int[Array, "G B T"],
        features: Float[Array, "G X D"] | None,
    ) -> Float[Array, "G B T D"]:
        """Token embeddings, with feature `feature_index` of the own group instead wherever that is not negative.

        Features are what stands in place of words: X merged visual tokens, slot embeddings, imagined latents.
        """
        # The table is split along D: every device looks up its part of every row, then the rows come together. Neither
        # the table nor its gradient is ever moved.
        x = partition.rows(self.text.embed[...][tokens])
        if features is None:
            return x
        G, B, T = tokens.shape
        flat = jnp.maximum(feature_index.reshape(G, B * T, 1), 0)
        given = jnp.take_along_axis(features.astype(x.dtype), flat, axis=1).reshape(x.shape)
        return jnp.where(feature_index[..., None] >= 0, given, x)

    def decode(
        self, x: Float[Array, "G B T D"], batch: dict[str, Array], **options: Any
    ) -> tuple[Float[Array, "G B T D"], Float[Array, "L G B T D"] | None]:
        """Final hidden states of packed rows, and every layer's with `collect`; options as TextDecoder takes them."""
        G, B, T, D = x.shape
        names = ("positions", "segment_ids", "view_ids", *(("hidden", "late") if "hidden" in batch else ()))
        rows = (batch[k].reshape(G * B, *batch[k].shape[2:]) for k in names)
        hidden, layers = self.text(x.reshape(G * B, T, D), *rows, **options)
        return hidden.reshape(G, B, T, D), None if layers is None else layers.reshape(-1, G, B, T, D)

    def logits(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """fp32 logits. For training, losses.next_token never holds them whole."""
        return jnp.einsum("...D,VD->...V", hidden, self.text.head, preferred_element_type=jnp.float32)


def encode(
    vision: VisionTower, config: ModelConfig, batch: dict[str, Array], *, image_patches: int, **options: Any
) -> Encoded:
    """`Qwen2_5_VL.encode` with the vision tower alone."""
    G, P, _ = batch["patches"].shape
    if not P:  # a batch without room for images: the tower is not run at all
        dtype = vision.patch.dtype
        D, O = config.vision.hidden_size, config.vision.out_hidden_size
        return jnp.zeros((G, 0, O), dtype), jnp.zeros((G, 0, D), dtype), None
    keys = ("patches", "patch_positions", "patch_window", "patch_image")
    mean, std = config.image_mean, config.image_std
    return vision(*(batch[k] for k in keys), image_patches=image_patches, mean=mean, std=std, **options)
