"""Low-rank adapters of the language model (Hu et al. 2021, LoRA): W stays, x W + (alpha / r) (x A) B learns.

Why not a library's: flax's `nnx.LoRA` (0.12) holds one pair of two axes each behind a `Linear`; ours are raw weights
of up to four axes, stacked along L. Qwix (0.1) finds weights by watching the einsums of a run of the model and makes
the pair there, inside the layer loop, from where it cannot come out. Neither knows axis letters, so nothing says how
the pair is sharded, and neither merges it back for the export.

Here the pair is two more weights of the layer, declared like any other: the scan slices them, their letters shard them,
checkpoints and the optimiser know them by path (`vlm.text.blocks.lora.q_a`). x A B is computed as such, not x (W + AB):
that would hold a layer's merged weights, and form the whole gradient of W only to contract it to two thin factors.
"""

import dataclasses
from collections.abc import Mapping
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from latent_jax.errors import UserError
from latent_jax.models.hf_export import host_rows
from latent_jax.models.parameters import Declare
from latent_jax.models.qwen2_5_vl.config import TextConfig

# What is adapted: every matrix of a layer, with the axes that it takes in. Its other axes come out. r is the rank.
INPUTS = {"q": "D", "k": "D", "v": "D", "o": "N H", "gate": "D", "up": "D", "down": "F"}
Weight = TypeVar("Weight", bound=jax.Array | np.ndarray)
# In a dotted path: whether it is an adapter's.
PART = ".lora."


class LoRA(nnx.Module):
    """The adapters of a stack of layers; B starts at zero, so that the model starts as it was.

    Args:
      block: the layers (models.qwen2_5_vl.text.TextBlock), whose weights say their axes and sizes.
      rank: r. alpha: the adapters' strength; their product is scaled by alpha / rank.
      rngs: source of A's values, normal with standard deviation 1 / sqrt(fan-in).
    """

    def __init__(self, block: nnx.Module, rank: int, alpha: float, rngs: nnx.Rngs):
        self.scale = alpha / rank
        for name, inputs in INPUTS.items():
            weight = getattr(block, name)
            axes = weight.get_metadata("axes").split()
            outputs = " ".join(letter for letter in axes[1:] if letter not in inputs.split())
            declare = Declare(dict(zip(axes, weight.shape), r=rank), rngs, jnp.float32)
            setattr(self, f"{name}_a", declare.normal(f"L {inputs} r", inputs))
            setattr(self, f"{name}_b", declare.constant(f"L r {outputs}", decay=True))

    def __call__(self, name: str, equation: str, x: Float[Array, "R T ..."]) -> Float[Array, "R T ..."]:
        """What one layer's adapter of matrix `name` adds to einsum(equation, x, matrix)."""
        a, b = (getattr(self, f"{name}_{half}") for half in "ab")
        a_axes, b_axes = (half.get_metadata("axes").replace(" ", "")[1:] for half in (a, b))
        low = jnp.einsum(f"{equation.partition(',')[0]},{a_axes}->RTr", x, a[...])
        return jnp.einsum(f"RTr,{b_axes}->{equation.partition('->')[2]}", low * self.scale, b[...])


@dataclasses.dataclass(frozen=True)
class Merged:
    """A stacked weight with its adapter added in fp32, a few layers at a time: nothing merged is ever held whole."""

    base: jax.Array | np.ndarray
    a: jax.Array | np.ndarray
    b: jax.Array | np.ndarray
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> np.dtype:
        """The base weight's. What slicing gives is fp32, for whoever writes it to round once."""
        return np.dtype(self.base.dtype)

    def __getitem__(self, layers: slice) -> np.ndarray:
        start, stop, _ = layers.indices(self.shape[0])
        base, a, b = (host_rows(x, start, stop - start).astype(np.float32) for x in (self.base, self.a, self.b))
        rank = b.shape[1]
        # Every adapted weight lies as the product does: L, then the axes that come in, then those that come out.
        product = a.reshape(len(a), -1, rank) @ b.reshape(len(b), rank, -1)
        return base + np.float32(self.scale) * product.reshape(base.shape)

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        whole = np.empty(self.shape, dtype or self.dtype)
        for layer in range(len(whole)):
            whole[layer : layer + 1] = self[layer : layer + 1].astype(self.dtype)
        return whole


def merge(arrays: Mapping[str, Weight], rank: int, alpha: float) -> dict[str, Weight | Merged]:
    """Arrays by dotted path with the adapters taken into the weights they adapt; as they are where rank is 0."""
    if not rank:
        return dict(arrays)
    found: dict[str, Weight | Merged] = {path: array for path, array in arrays.items() if PART not in path}
    for path in [path for path in arrays if PART in path and path.endswith("_a")]:
        owner, _, name = path.removesuffix("_a").partition(PART)
        target = f"{owner}.{name}"
        a, b = arrays[path], arrays[path.removesuffix("_a") + "_b"]
        found[target] = Merged(arrays[target], a, b, alpha / rank)
    return found


def adapted(path: str) -> str:
    """The path of the weight that an adapter's half stands beside; of any other weight its own."""
    owner, found, name = path.partition(PART)
    return f"{owner}.{name[:-2]}" if found else path


def check(rank: int, config: TextConfig) -> None:
    """Raises UserError where a rank is none that saves anything on this language model."""
    narrowest = min(config.hidden_size, config.num_key_value_heads * config.head_size)
    if rank >= narrowest:
        raise UserError(
            f"config.model.lora_rank: got {rank}, expected less than {narrowest}, "
            "the width of the model's narrowest matrix"
        )
