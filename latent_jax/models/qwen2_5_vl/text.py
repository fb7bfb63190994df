"""The language model (HF Qwen2_5_VLTextModel): grouped-query attention with M-RoPE, SwiGLU, RMSNorm."""

from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from latent_jax.models.parameters import Declare
from latent_jax.models.qwen2_5_vl.config import TextConfig
from latent_jax.models.qwen2_5_vl.rope import mrope, rotate
from latent_jax.models.remat import rematerialise
from latent_jax.ops import partition
from latent_jax.ops.attention import attention, packed_mask
from latent_jax.ops.norm import rms_norm


@runtime_checkable
class Adapters(Protocol):
    """Low-rank adapters of a layer's matrices, as models.lora.LoRA."""

    def __call__(self, name: str, equation: str, x: Float[Array, "R T ..."]) -> Float[Array, "R T ..."]: ...


class TextBlock(nnx.Module):
    """One decoder layer (HF Qwen2_5_VLDecoderLayer); its weights carry a leading L and are sliced by the scan."""

    lora: Adapters | None = None  # models.lora.LoRA where adapters are trained

    def __init__(self, config: TextConfig, rngs: nnx.Rngs, dtype: DTypeLike):
        self.eps = config.rms_norm_eps
        sizes = dict(L=config.num_hidden_layers, D=config.hidden_size, F=config.intermediate_size)
        sizes |= dict(N=config.num_attention_heads, K=config.num_key_value_heads, H=config.head_size)
        declare = Declare(sizes, rngs, dtype)
        depth = (2 * config.num_hidden_layers) ** -0.5
        self.attn_norm = declare.constant("L D", 1.0)
        self.q = declare.normal("L D N H", "D")
        self.q_bias = declare.constant("L N H")
        self.k = declare.normal("L D K H", "D")
        self.k_bias = declare.constant("L K H")
        self.v = declare.normal("L D K H", "D")
        self.v_bias = declare.constant("L K H")
        self.o = declare.normal("L N H D", "N H", depth)
        self.mlp_norm = declare.constant("L D", 1.0)
        self.gate = declare.normal("L D F", "D")
        self.up = declare.normal("L D F", "D")
        self.down = declare.normal("L F D", "F", depth)

    def qkv(
        self, x: Float[Array, "R T D"], angles: Float[Array, "R T I"]
    ) -> tuple[Float[Array, "R T N H"], Float[Array, "R T K H"], Float[Array, "R T K H"]]:
        """Queries, keys (both rotated) and values of this layer's normalised input."""
        y = rms_norm(x, self.attn_norm[...], self.eps)
        q = self.multiply("RTD,DNH->RTNH", y, "q") + self.q_bias[...]
        k = self.multiply("RTD,DKH->RTKH", y, "k") + self.k_bias[...]
        v = self.multiply("RTD,DKH->RTKH", y, "v") + self.v_bias[...]
        return rotate(q, angles), rotate(k, angles), v

    def finish(self, x: Float[Array, "R T D"], heads: Float[Array, "R T N H"]) -> Float[Array, "R T D"]:
        """The layer's output from its input and its attention heads."""
        x = x + self.multiply("RTNH,NHD->RTD", heads, "o")
        with jax.named_scope("mlp"):
            y = rms_norm(x, self.mlp_norm[...], self.eps)
            gate = jax.nn.silu(self.multiply("RTD,DF->RTF", y, "gate"))
            up = self.multiply("RTD,DF->RTF", y, "up")
            return x + self.multiply("RTF,FD->RTD", gate * up, "down")

    def multiply(self, equation: str, x: Float[Array, "R T ..."], name: str) -> Float[Array, "R T ..."]:
        """x by one of the layer's matrices, and by its adapter where it has one."""
        y = jnp.einsum(equation, x, getattr(self, name)[...])
        return y if self.lora is None else y + self.lora(name, equation, x)


class TextDecoder(nnx.Module):
    """Embeddings to final hidden states (after the last RMSNorm), packed or cached."""

    attention = "reference"  # of packed rows; see ops.attention

    def __init__(self, config: TextConfig, rngs: nnx.Rngs, dtype: DTypeLike):
        self.config = config
        declare = Declare(dict(V=config.vocab_size, D=config.hidden_size), rngs, dtype)
        # Tied tables are also the output layer: unit-variance rows would start with logits of size sqrt(D).
        self.embed = declare.normal("V D", "D")
        self.blocks = TextBlock(config, rngs, dtype)
        self.norm = declare.constant("D", 1.0)
        if not config.tie_word_embeddings:
            self.lm_head = declare.normal("V D", "D")

    @property
    def head(self) -> Float[Array, "V D"]:
        """The output layer: the embedding table itself where the checkpoint ties them."""
        return (self.embed if self.config.tie_word_embeddings else self.lm_head)[...]

    def angles(self, positions: Int[Array, "R 3 T"]) -> Float[Array, "R T I"]:
        return mrope(positions, self.config.head_size, self.config.rope_theta, self.config.mrope_section)

    def __call__(
        self,
        x: Float[Array, "R T D"],
        positions: Int[Array, "R 3 T"],
        segment_ids: Int[Array, "R T"],
        view_ids: Int[Array, "R T"],
        hidden: Bool[Array, "R T"] | None = None,
        late: Bool[Array, "R T"] | None = None,
        *,
        remat: str = "none",
        unroll: int = 1,
        collect: bool = False,
    ) -> tuple[Float[Array, "R T D"], Float[Array, "L R T D"] | None]:
        """Packed rows: (final hidden states, every layer's output or None)."""
        angles = self.angles(positions)
        mask = packed_mask(segment_ids, view_ids, hidden, late)

        def body(x: Array, block: TextBlock) -> tuple[Array, Array | None]:
            block = partition.gather_module(block)
            with jax.named_scope("attention"):
                heads = attention(*block.qkv(x, angles), mask, self.attention)
            x = partition.rows(block.finish(x, heads))
            return x, (x if collect else None)

        x, layers = jax.lax.scan(rematerialise(body, remat), partition.rows(x), self.blocks, unroll=unroll)
        return rms_norm(x, self.norm[...], self.config.rms_norm_eps), layers
