"""How arrays are split over the mesh: one rule for weights, by their axis letters, and one for rows.

Fully sharded data parallelism, spelled out so that the partitioner has nothing to guess: a weight lies in parts, is
gathered whole where a layer uses it, and its gradient is reduced and scattered back to where the parts lie; what is
computed from rows stays with the rows. Left to itself the partitioner would rather split the activations of a layer
over `fsdp` and sum all of them in every matmul.

Everything here asks for the ambient mesh (the training step sets it) and does nothing where there is none.
"""

import functools
from typing import Any, TypeVar

import jax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

Module = TypeVar("Module", bound=nnx.Module)

AXES = ("replica", "fsdp", "tp")
GROUPS = ("replica", "fsdp")
# Axis letter -> mesh axis. Letters not named here are never split.
RULES = {"D": "fsdp", "C": "fsdp", "Z": "fsdp", "N": "tp", "K": "tp", "F": "tp", "V": "tp"}


def ambient() -> AbstractMesh | None:
    """The mesh that the surrounding computation is split over; None where there is none, or one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 or set(mesh.axis_names) != set(AXES) else mesh


def gathers() -> bool:
    """Whether weights lie in parts here that a layer must gather first."""
    mesh = ambient()
    return mesh is not None and mesh.shape["fsdp"] > 1


def groups(mesh: Mesh | AbstractMesh) -> int:
    """Devices that see different rows."""
    return mesh.shape["replica"] * mesh.shape["fsdp"]


def weight_spec(axes: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> P:
    """Partition of one weight from its axis letters; a mesh axis is used once, and only where it divides."""
    spec, used = [], set()
    for letter, size in zip(axes.split(), shape, strict=True):
        name = RULES.get(letter)
        fits = name is not None and name not in used and size % mesh.shape[name] == 0
        spec.append(name if fits else None)
        used |= {name} if fits else set()
    return P(*spec)


def rows(x: jax.Array) -> jax.Array:
    """Pins an array whose first axis counts rows or groups: split over those, whole along every other axis."""
    mesh = ambient()
    if mesh is None or x.shape[0] % groups(mesh):
        return x
    return jax.lax.with_sharding_constraint(x, P(GROUPS))


def gather(weight: jax.Array, axes: str) -> jax.Array:
    """The weight whole over `fsdp` (still split over `tp`); its gradient comes back scattered as the weight lies."""
    mesh = ambient()
    if mesh is None or not gathers():
        return weight
    stored = weight_spec(axes, weight.shape, mesh)
    if "fsdp" not in stored:
        return weight
    return _gather(weight, stored)


def keep_all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """A remat policy: everything is kept for the backward pass but what `gather` (or `rows`, for free) made.

    Gathered weights kept for every layer would undo their sharding.
    """
    return primitive.name != "sharding_constraint"


def gather_module(module: Module, skip: str = "L") -> Module:
    """The module with every weight gathered; a leading letter `skip` that a scan has taken off is passed over."""

    def whole(variable: nnx.Variable) -> nnx.Variable:
        letters = variable.get_metadata("axes").split()
        value = variable[...]
        if letters[:1] == [skip] and value.ndim == len(letters) - 1:
            letters = letters[1:]
        return variable.replace(gather(value, " ".join(letters)))

    if not gathers():
        return module
    return jax.tree.map(whole, module, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather(weight: jax.Array, stored: P) -> jax.Array:
    return _gather_forward(weight, stored)[0]


def _gather_forward(weight: jax.Array, stored: P) -> tuple[jax.Array, None]:
    whole = P(*(None if name == "fsdp" else name for name in stored))
    return jax.lax.with_sharding_constraint(weight, whole), None


def _gather_backward(stored: P, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    # Without this the transpose of a gather would keep the gradient whole: an all-reduce of the layer's weights.
    return (jax.lax.with_sharding_constraint(gradient, stored),)


_gather.defvjp(_gather_forward, _gather_backward)
