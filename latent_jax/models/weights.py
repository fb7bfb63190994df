"""Weights declared once: axis letters give the shape, the sharding and the layout of the HF tensor."""

import math

import jax
import jax.numpy as jnp
from flax import nnx


class Statistic(nnx.Variable):
    """A value that travels with the model but is never trained (the latent targets' mean and scale)."""


class Declare:
    """Makes the weights of one module.

    Args:
      sizes: the size behind every axis letter, e.g. {"L": 28, "D": 3584}.
      rngs: source of the initial values.
      dtype: their dtype.
    """

    def __init__(self, sizes: dict[str, int], rngs: nnx.Rngs, dtype: jnp.dtype):
        self.sizes, self.rngs, self.dtype = sizes, rngs, dtype

    def shape(self, axes: str) -> tuple[int, ...]:
        return tuple(int(a) if a.isdigit() else self.sizes[a] for a in axes.split())

    def normal(self, axes: str, fan_in: str | None = None, scale: float = 1.0) -> nnx.Param:
        """Normal values of variance scale^2 / fan-in, the fan-in being the product of the named axes (1 if none)."""
        std = scale / math.sqrt(math.prod(self.shape(fan_in))) if fan_in else scale
        value = jax.random.normal(self.rngs.params(), self.shape(axes), jnp.float32) * std
        return nnx.Param(value.astype(self.dtype), axes=axes)

    def constant(self, axes: str, value: float = 0.0) -> nnx.Param:
        return nnx.Param(jnp.full(self.shape(axes), value, self.dtype), axes=axes)

    def statistic(self, axes: str, value: float) -> Statistic:
        return Statistic(jnp.full(self.shape(axes), value, jnp.float32), axes=axes)


def flatten(model: nnx.Module) -> dict[str, nnx.Variable]:
    """Every variable of a module under its dotted path, e.g. 'text.blocks.q'."""
    return {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(nnx.state(model))}


def assign(model: nnx.Module, values: dict[str, jax.Array]) -> None:
    """Puts arrays into a module's variables by dotted path, in place; paths not named keep what they hold."""
    variables = flatten(model)
    named = [(tuple(path.split(".")), variables[path].replace(value)) for path, value in values.items()]
    nnx.update(model, nnx.from_flat_state(named))
