"""The weight of a loss over the run."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def piecewise(points: tuple[tuple[float, float], ...], fraction: Float[Array, ""]) -> Float[Array, ""]:
    """The factor at a fraction of the run: linear between (fraction, factor) points, 1 without points."""
    if not points:
        return jnp.float32(1.0)
    at, factor = zip(*points, strict=True)
    return jnp.interp(fraction, jnp.array(at, jnp.float32), jnp.array(factor, jnp.float32))
