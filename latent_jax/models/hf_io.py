"""Reading Hugging Face checkpoints: files -> weights in our layout -> (sharded) JAX arrays.

Nothing of the model's size ever stands on the host beside the arrays themselves: tensors are views of memory-mapped
files, and what goes to a device goes there in pieces of `PIECE_BYTES`.
"""

import dataclasses
import functools
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from latent_jax.config.fields import shown
from latent_jax.errors import UserError
from latent_jax.models import sums, tensor_files
from latent_jax.models.qwen2_5_vl import hf_names
from latent_jax.models.qwen2_5_vl.config import ModelConfig, from_json
from latent_jax.runtime.files import read_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# What stands beside the weights: copied along into a workdir and into an export.
SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "chat_template.json",
    "chat_template.jinja",
    "LICENSE",
)
LATENT_WEIGHTS, LATENT_CONFIG = "latent_head.safetensors", "latent_config.json"
PIECE_BYTES = 64 * 2**20
# NumPy's transposing copy walks whole columns; this many at a time stay in cache (measured 3-4x faster).
_COLUMNS = 8


def resolve(model: str | Path) -> Path:
    """The checkpoint's directory. A hub id (`owner/name`) is downloaded, or found in the hub's cache.

    Raises UserError if there is no such directory and no such model, if the hub cannot be reached, or if a small file
    is not the one in the folder's checksums.json.
    """
    directory = _located(model)
    sums.check(directory)
    return directory


def _located(model: str | Path) -> Path:
    path = Path(model)
    if path.is_dir():
        return path
    if path.exists() or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(model)):
        what = "a file" if path.exists() else "no such directory"
        raise UserError(f"{model}: {what}; expected a checkpoint directory or a hub id (Qwen/Qwen2.5-VL-3B-Instruct)")
    from huggingface_hub import snapshot_download  # heavy, and needed only here

    patterns = [*SMALL_FILES, "*.safetensors", INDEX_FILE, LATENT_CONFIG, sums.FILE, sums.CARD]
    try:
        return Path(snapshot_download(str(model), allow_patterns=patterns))
    except Exception as problem:  # the hub raises its own, requests' and the file system's
        reason = str(problem).strip().partition("\n")[0] or type(problem).__name__
        raise UserError(f"{model}: no such directory, and the hub did not give it: {reason}") from None


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened HF checkpoint: published name -> read-only view of its file's pages, the file's name and, until the
    tensor is first read, the checksum with which it was written (where one is known)."""

    directory: Path
    tensors: dict[str, np.ndarray]
    files: dict[str, str]
    unread: dict[str, int]

    @classmethod
    def open(cls, directory: str | Path) -> "Checkpoint":
        """Maps `model.safetensors`, or the shards that the index names. Raises UserError naming what is wrong."""
        directory = _located(directory)
        known = sums.check(directory)
        tensors: dict[str, np.ndarray] = {}
        files: dict[str, str] = {}
        unread: dict[str, int] = {}
        for file, promised in _weight_files(directory).items():
            found = tensor_files.read(directory / file, known.get(file))
            if missing := [name for name in promised if name not in found]:
                raise UserError(
                    f"{directory / file}: tensor '{missing[0]}' is missing, {INDEX_FILE} says it is there"
                    + _and_more(missing)
                )
            for name, tensor in found.items():
                name = hf_names.normalise(name)
                if name in tensors:
                    raise UserError(f"{directory / file}: tensor '{name}' is already in {files[name]}")
                tensors[name], files[name] = tensor, file
            written = known[file]["tensors"] if file in known else {}
            unread |= {hf_names.normalise(name): crc for name, crc in written.items()}
        return cls(directory, tensors, files, unread)

    def check(self, name: str) -> None:
        """Raises UserError where a tensor is not as it was written: to be called before one is read, compares once."""
        if name in self.unread:
            sums.check_tensor(self.directory / self.files[name], name, self.tensors[name], self.unread[name])
            self.unread.pop(name, None)

    def weights(self, config: ModelConfig) -> dict[str, "FileWeight"]:
        """Our path -> weight. Raises UserError naming the first missing, unexpected or misshapen tensor.

        A tied checkpoint may store `lm_head.weight` too (some trainers write it); it must then equal the embedding, and
        is left out.
        """
        tensors = dict(self.tensors)
        expected = hf_names.published_shapes(config)
        if "lm_head.weight" in tensors and "lm_head.weight" not in expected:
            self.check("lm_head.weight")
            self.check("model.embed_tokens.weight")
            head, embedding = tensors.pop("lm_head.weight"), tensors.get("model.embed_tokens.weight")
            if embedding is None or not np.array_equal(head.view(np.uint8), embedding.view(np.uint8)):
                raise UserError(
                    f"{self.directory}: config.json ties the word embeddings, but lm_head.weight differs "
                    "from model.embed_tokens.weight"
                )
        if missing := [name for name in expected if name not in tensors]:
            raise UserError(f"{self.directory}: tensor '{missing[0]}' is missing" + _and_more(missing))
        if unexpected := [name for name in tensors if name not in expected]:
            raise UserError(
                f"{self.directory / self.files[unexpected[0]]}: unexpected tensor '{unexpected[0]}'"
                + _and_more(unexpected)
            )
        for name, shape in expected.items():
            tensor, where = tensors[name], f"{self.directory / self.files[name]}: tensor '{name}'"
            if tensor.shape != shape:
                raise UserError(f"{where} has shape {tensor.shape}, expected {shape} from config.json")
            if not jnp.issubdtype(tensor.dtype, jnp.floating):
                raise UserError(f"{where} has dtype {tensor.dtype}, expected float32, float16 or bfloat16")
        return {
            row.path: FileWeight({name: tensors[name] for name in row.names(config)}, row, config, self.check)
            for row in hf_names.weights(config)
        }


@runtime_checkable
class Readable(Protocol):
    """A weight that is read part by part, each a new C-ordered array."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self, index: tuple[slice, ...], dtype: np.dtype) -> np.ndarray: ...


class FileWeight:
    """One weight in our layout, still in its files: an index reads just that part.

    Args:
      tensors: of every layer, by published name.
      check: called with a tensor's name before it is read.

    Attributes:
      shape: ours, layers stacked.
      dtype: the tensors' own; where layers differ, the one that holds them all without loss.
    """

    def __init__(
        self, tensors: dict[str, np.ndarray], row: hf_names.Weight, config: ModelConfig, check: Callable[[str], None]
    ):
        self._layers = [row.to_ours(tensor, config) for tensor in tensors.values()]
        self._names, self._check = list(tensors), check
        self._stacked = row.stacked
        self.shape: tuple[int, ...] = row.shape(config)
        self.dtype = functools.reduce(jnp.promote_types, {tensor.dtype for tensor in tensors.values()})

    def __getitem__(self, index: tuple[slice, ...] | slice) -> np.ndarray:
        return self.read(index, self.dtype)

    def read(self, index: tuple[slice, ...] | slice, dtype: np.dtype) -> np.ndarray:
        """The indexed part as a new C-ordered array of the given dtype (rounded to nearest even where it narrows)."""
        index = index if isinstance(index, tuple) else (index,)
        for name in self._names[index[0]] if self._stacked else self._names:
            self._check(name)
        if not self._stacked:
            return copy_in_order(self._layers[0][index]).astype(dtype, copy=False)
        layers = [layer[index[1:]] for layer in self._layers[index[0]]]
        out = np.empty((len(layers), *layers[0].shape), dtype)
        for slot, layer in zip(out, layers, strict=True):
            if layer.dtype == dtype:
                copy_in_order(layer, slot)
            else:
                slot[...] = copy_in_order(layer)
        return out


def copy_in_order(view: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Copies a possibly transposed view into C order."""
    out = np.empty(view.shape, view.dtype) if out is None else out
    if view.ndim < 2 or view.strides[-1] == view.itemsize:
        out[...] = view
    else:
        for start in range(0, view.shape[-1], _COLUMNS):
            out[..., start : start + _COLUMNS] = view[..., start : start + _COLUMNS]
    return out


def load(
    directory: str | Path,
    config: ModelConfig | None = None,
    *,
    dtype: DTypeLike | Mapping[str, DTypeLike] | None = None,
    shardings: Mapping[str, jax.sharding.Sharding] | None = None,
    prefix: str = "",
) -> dict[str, jax.Array]:
    """Loads a checkpoint as {our path: array in our layout}.

    Args:
      directory: an HF directory or hub id.
      config: the model's shape; read from the directory's config.json if not given.
      dtype: one for all, or by path; a weight without one keeps the checkpoint's.
      shardings: by path; without one an array goes to the default device, uncommitted.
      prefix: only the weights whose path begins with it, such as "vision.".

    Raises:
      UserError: one line naming the file or tensor that is missing, truncated, unexpected or of the wrong shape.
    """
    checkpoint = Checkpoint.open(directory)
    weights = checkpoint.weights(config or from_json(checkpoint.directory / "config.json"))
    weights = {path: weight for path, weight in weights.items() if path.startswith(prefix)}

    def place(path: str) -> jax.Array:
        wanted = dtype.get(path) if isinstance(dtype, Mapping) else dtype
        kept = weights[path].dtype if wanted is None else jnp.dtype(wanted)
        return place_weight(weights[path], kept, (shardings or {}).get(path))

    # Threads overlap reading and copying; besides, the caller's mesh context, under which jax takes no array that lives
    # on one device only, is not theirs.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(weights, pool.map(place, weights), strict=True))


def place_weight(weight: Readable, dtype: np.dtype, sharding: jax.sharding.Sharding | None) -> jax.Array:
    """The weight on its devices. Not jax.make_array_from_callback: that holds all local shards on the host at once."""
    if sharding is None:
        return _transfer(weight, tuple(slice(0, n) for n in weight.shape), dtype, None)
    shards: list[jax.Array] = []
    first: dict[tuple, jax.Array] = {}
    for device, parts in sharding.addressable_devices_indices_map(weight.shape).items():
        index = tuple(slice(*part.indices(n)[:2]) for part, n in zip(parts or (), weight.shape, strict=True))
        key = tuple((part.start, part.stop) for part in index)
        if key in first:
            shards.append(jax.device_put(first[key], device))  # a replica: no second trip through the files
        else:
            first[key] = _transfer(weight, index, dtype, device)
            shards.append(first[key])
    return jax.make_array_from_single_device_arrays(weight.shape, sharding, shards)


def _transfer(weight: Readable, index: tuple[slice, ...], dtype: np.dtype, device: jax.Device | None) -> jax.Array:
    """One device's part of a weight, piecewise where it is large."""
    shape = tuple(part.stop - part.start for part in index)
    pieces = list(_pieces(shape, dtype.itemsize))
    if len(pieces) == 1:
        return jax.device_put(weight.read(index, dtype), device)
    buffer = jnp.zeros(shape, dtype, device=device)
    for piece in pieces:
        where = tuple(slice(part.start + at.start, part.start + at.stop) for part, at in zip(index, piece, strict=True))
        block = jax.device_put(weight.read(where, dtype), device)
        buffer = _put_block(buffer, block, [at.start for at in piece])
        buffer.block_until_ready()  # or the queue would hold every piece on the host
    return buffer


@functools.partial(jax.jit, donate_argnums=0)
def _put_block(buffer: jax.Array, block: jax.Array, start: list) -> jax.Array:
    """As bits: XLA:CPU computes on bfloat16 in float32, which is slow and would quieten signalling NaNs."""
    bits = jnp.dtype(f"uint{8 * buffer.dtype.itemsize}")
    as_bits = functools.partial(jax.lax.bitcast_convert_type, new_dtype=bits)
    placed = jax.lax.dynamic_update_slice(as_bits(buffer), as_bits(block), start)
    return jax.lax.bitcast_convert_type(placed, buffer.dtype)


def _pieces(shape: tuple[int, ...], itemsize: int) -> Iterator[tuple[slice, ...]]:
    """Cuts an array along its leading axes into pieces of at most `PIECE_BYTES` (or single elements of the last)."""
    if not shape:
        yield ()
        return
    row = math.prod(shape[1:]) * itemsize
    if row > PIECE_BYTES:
        for start in range(shape[0]):
            for rest in _pieces(shape[1:], itemsize):
                yield slice(start, start + 1), *rest
        return
    step = max(1, PIECE_BYTES // max(1, row))
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0])), *(slice(0, n) for n in shape[1:])


def _weight_files(directory: Path) -> dict[str, list[str]]:
    """Weight file -> the tensors that the index says it holds (none where there is no index)."""
    if (directory / SINGLE_FILE).exists():
        return {SINGLE_FILE: []}
    index = directory / INDEX_FILE
    if not index.exists():
        raise UserError(f"{directory}: not a checkpoint directory; expected {SINGLE_FILE} or {INDEX_FILE}")
    expected = "expected JSON with a 'weight_map' of tensors to files"
    weight_map = read_json(index, expected="JSON with a 'weight_map' of tensors to files").get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise UserError(f"{index}: {expected}")
    files: dict[str, list[str]] = {file: [] for file in sorted(set(weight_map.values()))}
    for name, file in weight_map.items():
        if not file or Path(file).name != file or file in (".", "..") or "\0" in file or len(file) > 255:
            raise UserError(f"{index}: tensor {shown(name)} is put in {shown(file)}, expected a file name")
        if not (directory / file).exists():
            raise UserError(f"{directory / file}: missing; {INDEX_FILE} names it")
        files[file].append(name)
    return files


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
