"""Where a method's frozen networks come from: tensors of a safetensors file, or arrays of the model itself.

Both are loaders of `Method.frozen`. A file is mapped, and each device takes its own part of a tensor from it, piece by
piece: nothing of the file's size stands on the host.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from latent_jax.errors import UserError
from latent_jax.models import hf_io, tensor_files

Arrays = Mapping[str, jax.Array]


class TensorFile:
    """A safetensors file, opened when the first of its tensors is asked for.

    Args:
      path: the file. key: the setting that names it, for messages.
    """

    def __init__(self, path: str | Path, key: str):
        self.path, self.key = path, key

    @functools.cached_property
    def tensors(self) -> dict[str, np.ndarray]:
        """Name -> view of the file's pages. Raises UserError where it is missing or damaged."""
        if not str(self.path):
            raise UserError(f"{self.key}: got '', expected a safetensors file")
        return tensor_files.read(Path(self.path))

    def tensor(self, name: str, to_ours: Callable[[np.ndarray], np.ndarray] = lambda tensor: tensor) -> "FileTensor":
        """The loader of one tensor. to_ours: to our layout, as a view (a transpose, a reshape)."""
        return FileTensor(self, name, to_ours)


@dataclasses.dataclass(frozen=True)
class FileTensor:
    """Loads one tensor of a file, which has the dtype that `build_head` declares or one that it holds without loss."""

    file: TensorFile
    name: str
    to_ours: Callable[[np.ndarray], np.ndarray]

    def dtype(self, stored: Mapping[str, np.dtype]) -> np.dtype | None:
        return None

    def check(self, path: str, like: jax.ShapeDtypeStruct) -> None:
        self._view(path, like)

    def __call__(self, path: str, like: jax.ShapeDtypeStruct, model: Arrays) -> jax.Array:
        return hf_io.place_weight(_Part(self._view(path, like), self._where), like.dtype, like.sharding)

    @property
    def _where(self) -> str:
        return f"{self.file.path}: tensor '{self.name}'"

    def _view(self, path: str, like: jax.ShapeDtypeStruct) -> np.ndarray:
        """In our layout, nothing read yet."""
        tensors = self.file.tensors
        if self.name not in tensors:
            raise UserError(f"{self._where} is missing; {path} is loaded from it")
        tensor = tensors[self.name]
        lossless = jnp.issubdtype(tensor.dtype, jnp.floating)
        lossless = lossless and jnp.promote_types(tensor.dtype, like.dtype) == like.dtype
        try:
            ours = self.to_ours(tensor)
        except ValueError:  # of another number of axes
            ours = tensor
        if ours.shape != like.shape or not lossless:
            raise UserError(
                f"{self._where} is {tensor.dtype} {tensor.shape}, expected what fits {path}: {like.dtype} {like.shape}"
            )
        return ours


@dataclasses.dataclass(frozen=True)
class _Part:
    """What hf_io.place_weight reads from."""

    view: np.ndarray
    where: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.view.shape

    def read(self, index: tuple[slice, ...], dtype: np.dtype) -> np.ndarray:
        part = hf_io.copy_in_order(self.view[index]).astype(dtype, copy=False)
        if not np.isfinite(part).all():
            raise UserError(f"{self.where} has values that are not finite; expected numbers")
        return part


class ModelCopy:
    """Copies an array of the model as the run begins with it, in the checkpoint's dtype; later it stays behind.

    Args:
      paths: of the model; the first that it has is copied: ("vlm.text.lm_head", "vlm.text.embed") is the output matrix
        of any model, tied or not.
    """

    def __init__(self, *paths: str):
        self.paths = paths

    def dtype(self, stored: Mapping[str, np.dtype]) -> np.dtype | None:
        return next((stored[path] for path in self.paths if path in stored), None)

    def check(self, path: str, like: jax.ShapeDtypeStruct) -> None:
        """No file, nothing that could be missing."""

    def __call__(self, path: str, like: jax.ShapeDtypeStruct, model: Arrays) -> jax.Array:
        source = next((model[name] for name in self.paths if name in model), None)
        if source is None or source.shape != like.shape:
            found = "none of them" if source is None else f"shape {source.shape}"
            raise ValueError(f"{path}: a copy of {self.paths} of shape {like.shape}; the model has {found}")
        # A copy, not the same buffer: the step donates what it trains.
        copy = lambda array: jnp.array(array, like.dtype, copy=True)  # noqa: E731
        return jax.jit(copy, out_shardings=like.sharding)(source)
