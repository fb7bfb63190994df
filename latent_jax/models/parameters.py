"""Weights declared once: axis letters give the shape, the sharding and the layout of the HF tensor."""

import dataclasses
import math
from typing import Generic, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

Module = TypeVar("Module", bound=nnx.Module)


class Statistic(nnx.Variable):
    """A value that travels with the model but is never trained (the latent targets' mean and scale)."""


class Declare:
    """Makes the weights of one module.

    Args:
      sizes: the size behind every axis letter, e.g. {"L": 28, "D": 3584}.
      rngs: source of the initial values.
      dtype: their dtype.
    """

    def __init__(self, sizes: dict[str, int], rngs: nnx.Rngs, dtype: DTypeLike):
        self.sizes, self.rngs, self.dtype = sizes, rngs, dtype

    def shape(self, axes: str) -> tuple[int, ...]:
        return tuple(int(a) if a.isdigit() else self.sizes[a] for a in axes.split())

    def normal(self, axes: str, fan_in: str, scale: float = 1.0, decay: bool = True) -> nnx.Param:
        """Normal values of standard deviation scale / sqrt(fan-in), the fan-in being the product of the named axes.

        decay: whether weight decay is for it: for matrices, not for embeddings that are added to or stand alone.
        """
        std = scale / math.sqrt(math.prod(self.shape(fan_in)))
        value = jax.random.normal(self.rngs.params(), self.shape(axes), jnp.float32) * std
        return nnx.Param(value.astype(self.dtype), axes=axes, decay=decay)

    def constant(self, axes: str, value: float = 0.0, decay: bool = False) -> nnx.Param:
        """One value everywhere: by default without weight decay, as norms, biases and scalars are."""
        return nnx.Param(jnp.full(self.shape(axes), value, self.dtype), axes=axes, decay=decay)

    def statistic(self, axes: str, value: float) -> Statistic:
        return Statistic(jnp.full(self.shape(axes), value, jnp.float32), axes=axes)


@dataclasses.dataclass(frozen=True)
class Structure(Generic[Module]):
    """A model without its arrays: what turns a flat dict of dotted paths into a module, and back.

    Training, checkpoints, HF names and optimiser masks all speak of arrays by dotted path, as `vlm.text.blocks.q`.
    """

    graph: nnx.GraphDef[Module]
    variables: dict[str, nnx.Variable]

    @classmethod
    def of(cls, model: Module) -> "Structure[Module]":
        """The structure of a module, which may be abstract (`nnx.eval_shape`)."""
        graph, state = nnx.split(model)
        return cls(graph, {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)})

    def axes(self, path: str) -> str:
        return self.variables[path].get_metadata("axes")

    def trained(self, path: str) -> bool:
        """Whether the variable is a weight rather than a statistic."""
        return isinstance(self.variables[path], nnx.Param)

    def decayed(self, path: str) -> bool:
        """Whether weight decay is for it, as it was declared."""
        return self.variables[path].get_metadata("decay")

    def shape(self, path: str) -> tuple[int, ...]:
        return self.variables[path].shape

    def arrays(self, model: Module) -> dict[str, jax.Array]:
        """The arrays of a module of this structure."""
        return {path: variable[...] for path, variable in Structure.of(model).variables.items()}

    def build(self, arrays: dict[str, jax.Array]) -> Module:
        """The module with these arrays; every path must be there."""
        flat = [(_keys(path), variable.replace(arrays[path])) for path, variable in self.variables.items()]
        return nnx.merge(self.graph, nnx.from_flat_state(flat))


def _keys(path: str) -> tuple[str | int, ...]:
    """Names of attributes, and places in a list of modules or weights."""
    return tuple(int(part) if part.isdecimal() else part for part in path.split("."))
