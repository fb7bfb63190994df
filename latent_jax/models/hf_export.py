"""Writing Hugging Face checkpoints: weights in our layout -> a directory that stock transformers loads.

Tensors are taken from the (sharded) arrays one by one and written as a stream. The directory is built beside its
destination and renamed into place: a killed export leaves nothing half-written.
"""

import functools
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.typing import DTypeLike

from latent_jax.config.fields import shown
from latent_jax.errors import UserError
from latent_jax.models import hf_io, staging, sums, tensor_files
from latent_jax.models.hf_io import INDEX_FILE, LATENT_CONFIG, LATENT_WEIGHTS, PIECE_BYTES, SINGLE_FILE, SMALL_FILES
from latent_jax.models.origin import ORIGIN_FILE, Origin, check_origin, copy_files, set_limits, write_json
from latent_jax.models.origin import keep_origin as keep_origin
from latent_jax.models.qwen2_5_vl import hf_names
from latent_jax.models.qwen2_5_vl.config import ModelConfig
from latent_jax.models.sums import CARD
from latent_jax.runtime.files import read_bytes, read_json, whole

MAX_SHARD_BYTES = 5_000_000_000
_NAMED = 5  # tensors that a line names, of those that are not finite
CARD_MARK = "<!-- written by latent_jax; a rerun replaces this file. Remove this line to keep your own. -->"


@runtime_checkable
class RowReader(Protocol):
    """A weight that is read a few rows of its leading axis at a time: in a file, or made as it is asked for."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def __getitem__(self, rows: slice) -> np.ndarray: ...


def save(
    directory: str | Path,
    params: Mapping[str, jax.Array | np.ndarray | RowReader],
    config: ModelConfig,
    *,
    source: str | Path | None = None,
    dtype: DTypeLike | None = None,
    max_shard_bytes: int | None = None,
    latent: tuple[Mapping[str, np.ndarray], dict] | None = None,
    card: str | None = None,
    limits: Mapping[str, int] | None = None,
    keep_not_finite: bool = False,
) -> list[str]:
    """Writes a checkpoint under published names. With many processes all of them call this; the first one writes.

    Returns lines worth saying: what of the user's own was kept, and which values are not finite.

    Args:
      directory: where to; replaced whole if it is an earlier export, refused if it holds anything else.
      params: {our path: weight in our layout}, exactly the paths of `hf_names.shapes(config)`.
      source: an HF directory, or a workdir's record made by `keep_origin`: its config, tokenizer and processor files
        are copied along, and its dtypes and its choice of one file or shards are kept.
      dtype: of every tensor, instead of the source's; config.json then says so. Where neither the source's weights nor
        its config.json state a dtype, the arrays' own is kept.
      max_shard_bytes: the largest shard; without it one file where the source was one, else 5 GB.
      latent: tensors and config of what HF has no place for, see `save_latent`; without it the source's, if any.
      card: the README.md to write, see `card.text`. One of the user's own (without our mark) is kept in its place.
      limits: min_pixels, max_pixels to state in place of the source's.
      keep_not_finite: for a copy: values that are NaN or infinite are written as the source has them.

    Raises:
      UserError: the destination is the source, or holds files that no export writes; a tensor has values that are not
        finite, as they are or in `dtype`; the source's kept files are damaged.
    """
    directory = Path(os.path.realpath(directory))
    if params.keys() != hf_names.shapes(config).keys():
        wrong = sorted(params.keys() ^ hf_names.shapes(config).keys())
        raise ValueError(f"weights missing, or not of this model: {', '.join(wrong)}")
    if source and (place := Path(os.path.realpath(source))) in (directory, *directory.parents):
        what = "replace its own source" if place == directory else f"stand inside its own source, {place}"
        raise UserError(f"{directory}: the export would {what}; expected another directory")
    check_replaceable(directory)
    if source and (Path(source) / ORIGIN_FILE).exists():
        check_origin(source)
    elif source:
        sums.check(source)
    own = _own_card(directory)
    unsound: list[str] | None = [] if keep_not_finite else None
    origin = Origin.of(source) if source else None
    limit = max_shard_bytes or (math.inf if origin and origin.single_file else MAX_SHARD_BYTES)
    stated = _stated_dtype(Path(source)) if source and not origin else None
    shards = _shards(_entries(params, config, origin, stated if dtype is None else dtype, unsound), limit)
    if jax.process_index() == 0:
        with staging.staged(directory) as partial:
            written = _write(partial, shards, Path(source) if source else None, dtype, limits or {})
            latent = latent or (load_latent(source) if source else None)
            if latent:
                written |= save_latent(partial, *latent, unsound)
            sums.write(partial, written)
            if own or card:
                with whole(partial / CARD) as file:
                    file.write(own or f"{card}\n\n{CARD_MARK}\n".encode())
    else:  # takes part in gathering what is sharded over processes
        for entries in shards.values():
            for entry in tensor_files.in_order(entries).values():
                for _ in entry.pieces():
                    pass
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"exported {directory}")
    notes = [f"{directory / CARD}: your own, kept; remove it for the card that an export writes"] if own else []
    if unsound:
        more = f" and {len(unsound) - _NAMED} more" if len(unsound) > _NAMED else ""
        notes.append(f"kept, though not finite (NaN or infinite): values of {', '.join(unsound[:_NAMED])}{more}")
    return notes


def check_replaceable(directory: str | Path) -> None:
    """Raises UserError if the directory holds anything but an earlier export, weights included, which `save` would
    delete.

    What a killed export left beside it is cleared, or takes its place where nothing else does. A README.md is no
    hindrance: where it is the user's own, `save` keeps it.
    """
    directory, place = Path(directory), Path(os.path.realpath(directory))
    if jax.process_index() == 0 and place.name:  # the root has none, and nothing beside it
        staging.recover(place)
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory}: a file; expected a directory to write a checkpoint to")
    known = {*SMALL_FILES, LATENT_WEIGHTS, LATENT_CONFIG, INDEX_FILE, ORIGIN_FILE, sums.FILE, CARD}
    expected = "expected a new or empty directory, or an earlier export to replace"
    entries, weights = sorted(directory.iterdir()) if directory.exists() else [], False
    for entry in entries:
        is_weights = re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors", entry.name) is not None
        if (entry.name not in known and not is_weights) or entry.is_dir():
            raise UserError(f"{directory}: holds '{entry.name}', which no export writes; {expected}")
        weights = weights or is_weights or entry.name in (INDEX_FILE, sums.FILE)  # of one that is damaged
    if not weights and (others := [entry.name for entry in entries if entry.name != CARD]):
        raise UserError(f"{directory}: holds '{others[0]}' and no weights, so it is no export; {expected}")


def write_card(directory: Path, text: str) -> None:
    """Replaces the README.md of an export that `save` wrote; one of the user's own stays."""
    if _own_card(directory) is None:
        with whole(directory / CARD) as file:
            file.write(f"{text}\n\n{CARD_MARK}\n".encode())


def _own_card(directory: Path) -> bytes | None:
    """The README.md of an earlier export where somebody else wrote it."""
    file = directory / CARD
    text = read_bytes(file) if file.exists() else None
    return None if text is None or CARD_MARK.encode() in text else text


def save_latent(
    directory: str | Path, tensors: Mapping[str, np.ndarray], config: dict, unsound: list[str] | None = None
) -> dict:
    """Writes `latent_head.safetensors`, where there are tensors, and `latent_config.json` (any JSON) into a directory.

    A tensor that is not finite goes into `unsound`; UserError where that is None. Returns {file: checksums of its
    tensors}, see `tensor_files.write`.
    """
    entries = {name: tensor_files.Entry.of(np.asarray(tensor)) for name, tensor in tensors.items()}
    wrong = [name for name, tensor in tensors.items() if not np.isfinite(np.asarray(tensor)).all()]
    if wrong:
        if unsound is None:
            raise UserError(f"the latent head's '{wrong[0]}' has values that are not finite; it is not exported")
        unsound += wrong
    written = {LATENT_WEIGHTS: tensor_files.write(Path(directory) / LATENT_WEIGHTS, entries)} if entries else {}
    write_json(Path(directory) / LATENT_CONFIG, config)
    return written


def load_latent(directory: str | Path) -> tuple[dict[str, np.ndarray], dict] | None:
    """The inverse of `save_latent`; None where a checkpoint has neither file. UserError where it has tensors alone, or
    where it is not what was written."""
    weights, config = Path(directory) / LATENT_WEIGHTS, Path(directory) / LATENT_CONFIG
    written = sums.check(directory).get(LATENT_WEIGHTS)
    if not weights.exists() and not config.exists():
        return None
    tensors = tensor_files.read(weights, written) if weights.exists() or written else {}
    if written:
        for name, tensor in tensors.items():
            sums.check_tensor(weights, name, tensor, written["tensors"].get(name))
    if not config.exists():
        raise UserError(f"{config}: no such file, but {LATENT_WEIGHTS} stands beside it")
    return tensors, read_json(config)


def _write(
    directory: Path, shards: dict, source: Path | None, dtype: DTypeLike | None, limits: Mapping[str, int]
) -> dict:
    """Everything but the head, the card and the checksums, which are returned for the weights."""
    if source:
        copy_files(source, directory, SMALL_FILES)
    set_limits(directory, limits)
    if dtype is not None and (directory / "config.json").exists():
        _restate_dtype(directory / "config.json", jnp.dtype(dtype))
    written = {file: tensor_files.write(directory / file, entries) for file, entries in shards.items()}
    # Even of one file: without an index many clients read every *.safetensors, the latent head's too.
    write_json(directory / INDEX_FILE, _index(shards))
    return written


def _entries(
    params: Mapping, config: ModelConfig, origin: Origin | None, dtype: DTypeLike | None, unsound: list[str] | None
) -> Iterator[tuple[str, tensor_files.Entry]]:
    for row, layer, name in hf_names.published(config):
        value = params[row.path]
        kept = origin.dtypes.get(name, value.dtype) if origin else value.dtype
        target = jnp.dtype(kept if dtype is None else dtype)
        pieces = functools.partial(_pieces, value, row, layer, config, target, name, unsound)
        yield name, tensor_files.Entry(target, row.published_shape(config), pieces)


def _pieces(
    value: jax.Array | np.ndarray | RowReader,
    row: hf_names.Weight,
    layer: int,
    config: ModelConfig,
    dtype: np.dtype,
    name: str,
    unsound: list[str] | None,
) -> Iterator[np.ndarray]:
    """One published tensor: whole, or in blocks of rows where both sides have the same axes (the large embeddings).

    Where its values are not finite, its name goes into `unsound`; UserError where that is None.
    """
    starts: Sequence[int] = [0]
    if row.stacked:
        starts, step = [layer], 1
    elif row.ours == row.theirs:
        step = max(1, PIECE_BYTES * value.shape[0] // math.prod(value.shape) // value.dtype.itemsize)
        starts = range(0, value.shape[0], step)
    else:
        step = value.shape[0]
    for start in starts:
        with np.errstate(over="ignore"):  # said below, with the tensor's name
            rows = host_rows(value, start, min(step, value.shape[0] - start)).astype(dtype, copy=False)
        if not np.isfinite(rows).all():
            if unsound is None:
                raise UserError(f"tensor '{name}' has values that are not finite in {dtype}; it is not exported")
            unsound += [name] if name not in unsound else []
        if row.stacked or row.ours != row.theirs:
            rows = row.to_published(rows[0] if row.stacked else rows, config)
        yield rows if rows.flags.c_contiguous else hf_io.copy_in_order(rows)


def gather(value: jax.Array) -> np.ndarray:
    """An array on the host, whatever it is sharded over, fetched piece by piece; with many processes all call this."""
    if not value.ndim:
        return np.asarray(value)
    step = max(1, PIECE_BYTES * value.shape[0] // max(value.nbytes, 1))
    rows = [host_rows(value, at, min(step, value.shape[0] - at)) for at in range(0, value.shape[0], step)]
    return np.concatenate(rows)


def host_rows(value: jax.Array | np.ndarray | RowReader, start: int, count: int) -> np.ndarray:
    """Rows of the leading axis on the host, whatever the array is sharded over; only they are moved there."""
    if not isinstance(value, jax.Array):
        return value[start : start + count]
    if not value.is_fully_addressable and value.is_fully_replicated:
        value = value.addressable_data(0)
    if not value.is_fully_addressable:
        return multihost_utils.process_allgather(jax.lax.dynamic_slice_in_dim(value, start, count), tiled=True)
    out = np.empty((count, *value.shape[1:]), value.dtype)
    for shard in value.addressable_shards:
        first, last, _ = shard.index[0].indices(value.shape[0])
        low, high = max(start, first), min(start + count, last)
        if low >= high or shard.replica_id:
            continue
        # A mesh of its own: under the caller's, jax takes no array that lives on one device only.
        with jax.set_mesh(jax.sharding.Mesh(np.array([shard.device]), ("device",))):
            part = np.asarray(jax.lax.dynamic_slice_in_dim(shard.data, low - first, high - low))
        if part.shape == out.shape:
            return part
        out[(slice(low - start, high - start), *shard.index[1:])] = part
    return out


def _shards(entries: Iterator[tuple[str, tensor_files.Entry]], limit: float) -> dict[str, dict]:
    """File name -> its tensors, filled in order up to the limit (a larger tensor has a file of its own)."""
    shards: list[dict[str, tensor_files.Entry]] = [{}]
    used = 0
    for name, entry in entries:
        if shards[-1] and used + entry.nbytes > limit:
            shards.append({})
            used = 0
        shards[-1][name] = entry
        used += entry.nbytes
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def _index(shards: dict[str, dict]) -> dict:
    total = sum(entry.nbytes for shard in shards.values() for entry in shard.values())
    weight_map = {name: file for file, shard in shards.items() for name in shard}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def _stated_dtype(source: Path) -> np.dtype | None:
    """The dtype that a config.json without weights states, under its published or its newer key."""
    config = read_json(source / "config.json")
    stated = config.get("dtype") or config.get("torch_dtype")
    try:
        return jnp.dtype(stated) if stated else None
    except TypeError:
        raise UserError(f"{source / 'config.json'}: dtype is {shown(stated)}, expected float32 or bfloat16") from None


def _restate_dtype(path: Path, dtype: np.dtype) -> None:
    """transformers loads in the dtype that config.json states, wherever it states one."""
    config = read_json(path)
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
    config.update(dict.fromkeys(keys, str(dtype)))
    for part in (config.get("text_config"), config.get("vision_config")):
        for key in {"dtype", "torch_dtype"} & (part or {}).keys():
            part[key] = str(dtype)
    write_json(path, config)
