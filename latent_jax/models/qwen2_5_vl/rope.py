"""Rotary position angles: M-RoPE of the language model, row/column angles of the vision tower.

Angles are fp32 whatever the model's dtype: bf16 rounds position 257 to 256.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def mrope(
    positions: Int[Array, "R 3 T"], head_size: int, theta: float, sections: tuple[int, int, int]
) -> Float[Array, "R T I"]:
    """Angles of the language model; I = head_size / 2 (HF Qwen2_5_VLTextRotaryEmbedding).

    The frequencies are split into `sections`: the first turn with the temporal position, the next with the row, the
    last with the column. Text has all three equal, which makes it ordinary RoPE.
    """
    frequencies = 1.0 / theta ** (jnp.arange(0, head_size, 2, dtype=jnp.float32) / head_size)
    axis = jnp.repeat(jnp.arange(3), jnp.array(sections), total_repeat_length=head_size // 2)
    return jnp.einsum("RIT,I->RTI", positions.astype(jnp.float32)[:, axis], frequencies)


def axial(positions: Int[Array, "G P 2"], head_size: int, theta: float = 10000.0) -> Float[Array, "G P I"]:
    """Angles of the vision tower: the first half turns with the row, the second with the column
    (HF Qwen2_5_VLVisionRotaryEmbedding)."""
    half = head_size // 2
    frequencies = 1.0 / theta ** (jnp.arange(0, half, 2, dtype=jnp.float32) / half)
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    return angles.reshape(*positions.shape[:-1], half)


def rotate(x: Float[Array, "R T N H"], angles: Float[Array, "R T I"]) -> Float[Array, "R T N H"]:
    """Turns the pairs (x[i], x[i + I]) by the angles, in fp32."""
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
