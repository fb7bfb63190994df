"""The latent head: hidden states at slot positions to latents in the vision encoder's space."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from latent_jax.models.parameters import Declare
from latent_jax.models.qwen2_5_vl.model import Qwen2_5_VL
from latent_jax.ops.norm import rms_norm

EPS = 1e-6


class LatentHead(nnx.Module):
    """Slots, the light MLP M_phi, and the statistics of its targets (latent pretraining, docs/methods.md).

    M_phi is RMSNorm, Linear D to F, GELU, Linear F to Z. It predicts *standardised* latents; `unstandardise` maps
    them back to the encoder's space before they are used as inputs. `slots` are the embeddings that stand at the slot
    positions of the input sequence, one for each cell of the pooled grid.

    Args:
      slots: S, latents an image has.
      hidden: D, width of the language model.
      target: Z, width of the target space.
      width: F, width of the MLP.
      logit_scale, logit_bias: where the alignment loss's learned scale (its log) and bias start.
    """

    def __init__(
        self,
        slots: int,
        hidden: int,
        target: int,
        width: int,
        *,
        logit_scale: float = 0.0,
        logit_bias: float = 0.0,
        rngs: nnx.Rngs,
    ):
        declare = Declare(dict(S=slots, D=hidden, F=width, Z=target), rngs, jnp.float32)
        # Rows of a trained embedding table are small; slots start at a similar scale.
        self.slots = declare.normal("S D", "D", decay=False)
        self.norm = declare.constant("D", 1.0)
        self.fc1 = declare.normal("D F", "D")
        self.fc1_bias = declare.constant("F")
        self.fc2 = declare.normal("F Z", "F")
        self.fc2_bias = declare.constant("Z")
        self.logit_scale = declare.constant("", logit_scale)
        self.logit_bias = declare.constant("", logit_bias)
        self.mean = declare.statistic("Z", 0.0)
        self.scale = declare.statistic("Z", 1.0)

    def __call__(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch Z"]:
        """Predicts standardised latents, fp32."""
        with jax.named_scope("latent_head"):
            x = rms_norm(hidden, self.norm[...], EPS)
            x = jax.nn.gelu(jnp.einsum("...D,DF->...F", x, self.fc1[...]) + self.fc1_bias[...], approximate=False)
            return (jnp.einsum("...F,FZ->...Z", x, self.fc2[...]) + self.fc2_bias[...]).astype(jnp.float32)

    def standardise(self, latents: Float[Array, "*batch Z"]) -> Float[Array, "*batch Z"]:
        """Latents of the encoder's space, centred and scaled by the dataset's statistics."""
        return (latents.astype(jnp.float32) - self.mean[...]) / self.scale[...]

    def unstandardise(self, latents: Float[Array, "*batch Z"]) -> Float[Array, "*batch Z"]:
        """The inverse of `standardise`: predicted latents as the encoder would give them, to be used as inputs."""
        return latents * self.scale[...] + self.mean[...]


class LatentVLM(nnx.Module):
    """A vision-language model and what a method puts beside it (None where it adds nothing)."""

    def __init__(self, vlm: Qwen2_5_VL, head: nnx.Module | None):
        self.vlm = vlm
        self.head: Any = head  # each method knows the class of its own
