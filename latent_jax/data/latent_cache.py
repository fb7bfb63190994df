"""A latent cache: the frozen encoder's features of every record of one split, computed once, read by index.

A directory of `cache.json` (dataset, encoder and settings of the latents) and shards `latents-00000.npy`, each whole or
absent: a run that was killed while it filled the cache goes on at the first missing shard. A row is one record: the
latents of its target images, and a checksum of these images.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from latent_jax.data.sources import Record, Records
from latent_jax.errors import UserError
from latent_jax.runtime import files, lock

MANIFEST = "cache.json"
FORMAT = 1
# A kill loses at most one shard; 256 MiB is the size that shards of large latents have.
_SHARD_RECORDS, _SHARD_BYTES = 1024, 256 * 2**20
# What is kept -> how a .npy file holds it: NumPy's format does not know bfloat16.
_DTYPES = {"float32": (np.dtype(np.float32), "<f4"), "bfloat16": (np.dtype(ml_dtypes.bfloat16), "<u2")}


@dataclasses.dataclass(frozen=True, eq=False)
class LatentCache:
    """One split's latents, at most S of size Z a record, float32 or bfloat16.

    `made_from` is JSON-able and holds all that the latents depend on: dataset, encoder, preprocessing, pooling.
    """

    folder: Path
    made_from: Mapping[str, Any]
    records: int
    shape: tuple[int, int]
    dtype: str

    @classmethod
    def open(
        cls, folder: str | Path, made_from: Mapping[str, Any], records: int, shape: tuple[int, int], dtype: str
    ) -> "LatentCache":
        """The cache in `folder`, begun there if nothing is. Its shards may still be `missing`.

        Raises UserError naming the differences if the folder holds latents that were made from something else.
        """
        cache = cls(Path(folder), made_from, records, shape, dtype)
        wanted, file = cache._manifest(), cache.folder / MANIFEST
        if not file.exists():
            # A kill while the first file was written leaves a part of it, under a name of its own.
            held = list(cache.folder.iterdir()) if cache.folder.exists() else []
            if any(not each.name.startswith(f".{MANIFEST}.") for each in held):
                raise UserError(
                    f"{cache.folder}: not empty and no latent cache (no {MANIFEST}); expected a new directory"
                )
            files.write_text(file, json.dumps(wanted, indent=2) + "\n")
        try:
            found = _flat(files.read_json(file))
        except (UserError, RecursionError) as problem:
            said = str(problem).removeprefix(f"{file}: ")
            raise UserError(
                f"{file}: not a JSON object; delete {cache.folder}, and it is made again ({said})"
            ) from None
        wanted = _flat(json.loads(json.dumps(wanted)))
        differ = [key for key in {**wanted, **found} if wanted.get(key) != found.get(key)]
        if differ:
            changes = ", ".join(f"{key} ({found.get(key)} there, {wanted.get(key)} here)" for key in differ)
            raise UserError(
                f"{cache.folder}: this latent cache was made from something else: {changes}; set "
                "config.data.latent_cache to another directory, or delete this one"
            )
        return cache

    def _manifest(self) -> dict:
        own = {"format": FORMAT, "records": self.records, "shape": list(self.shape), "dtype": self.dtype}
        return {**self.made_from, **own}

    # ------------------------------------------------------------ shards

    @functools.cached_property
    def shard_records(self) -> int:
        return max(1, min(_SHARD_RECORDS, _SHARD_BYTES // self._unchecked.itemsize))

    @property
    def shards(self) -> int:
        return math.ceil(self.records / self.shard_records)

    def missing(self) -> list[int]:
        """Shards that are still to be made. Raises UserError naming one that is damaged."""
        return [shard for shard in range(self.shards) if self._offset(shard) is None]

    def indices(self, shard: int) -> range:
        """The records of a shard."""
        return range(shard * self.shard_records, min((shard + 1) * self.shard_records, self.records))

    def write(self, shard: int, rows: Mapping[int, tuple[Sequence[bytes], np.ndarray]]) -> None:
        """Writes a shard: record index -> (encoded images, their latents (s, Z), s <= S: a record may have fewer images
        than there is room for). Records without latents are left out."""
        own = self.indices(shard)
        table = np.zeros(len(own), self._row)
        for index, (images, latents) in rows.items():
            row = table[own.index(index)]
            row["known"], row["image"] = 1 + self.shape[0] - len(latents), _checksum(images)
            row["latents"][: len(latents)] = latents.astype(_DTYPES[self.dtype][0]).view(_DTYPES[self.dtype][1])
        for index, row in zip(own, table, strict=True):
            row["sum"] = _sum(index, row)
        with files.whole(self._file(shard)) as file:
            np.save(file, table)

    def read(self, index: int, images: Sequence[bytes]) -> np.ndarray | None:
        """The latents (s, Z) of a record; None where it could not be encoded when the cache was made.

        Reads the row from disk on every call. Raises UserError where `images` are not those that were encoded.
        """
        shard, place = divmod(index, self.shard_records)
        start, kind = self._offsets[shard]
        try:
            row = np.memmap(self._file(shard), kind, "r", start + place * kind.itemsize, shape=(1,))[0]
        except (OSError, ValueError):
            raise UserError(self._damaged(shard)) from None
        if "sum" in (kind.names or ()) and row["sum"] != _sum(index, row):
            raise UserError(f"{self._damaged(shard)} (record {index} is not as it was written)")
        if not row["known"]:
            return None
        if row["image"] != _checksum(images):
            raise UserError(
                f"{self.folder}: record {index} has another image than when this latent cache was made; set "
                "config.data.latent_cache to another directory, or delete this one"
            )
        return row["latents"].view(_DTYPES[self.dtype][0])[: self.shape[0] + 1 - int(row["known"])]

    @property
    def _row(self) -> np.dtype:
        """known: 0 without latents, else 1 + how many of the S are unused. image: checksum of the images."""
        checks = [("known", "<u4"), ("image", "<u4"), ("sum", "<u4")]
        return np.dtype([*checks, ("latents", _DTYPES[self.dtype][1], self.shape)])

    @property
    def _unchecked(self) -> np.dtype:
        """Rows as they were before they had a checksum of their own."""
        return np.dtype([("known", "<u4"), ("image", "<u4"), ("latents", _DTYPES[self.dtype][1], self.shape)])

    @functools.cached_property
    def _offsets(self) -> list[tuple[int, np.dtype]]:
        """Offset and dtype of each shard's rows. Raises UserError if the cache is not complete."""
        offsets = [self._offset(shard) for shard in range(self.shards)]
        if None in offsets:
            raise UserError(f"{self._file(offsets.index(None))}: missing; the latent cache is not complete")
        return [offset for offset in offsets if offset is not None]

    def _file(self, shard: int) -> Path:
        return self.folder / f"latents-{shard:05}.npy"

    def _offset(self, shard: int) -> tuple[int, np.dtype] | None:
        file = self._file(shard)
        if not os.path.lexists(file):
            return None
        try:
            rows = np.load(file, mmap_mode="r") if file.is_file() else None
        except Exception:  # NumPy parses the header as Python
            rows = None
        # No memory map: an archive (.npz), which NumPy opens as one whatever its name is.
        if not isinstance(rows, np.memmap) or rows.dtype not in (self._row, self._unchecked):
            raise UserError(self._damaged(shard))
        if rows.shape != (len(self.indices(shard)),):
            raise UserError(self._damaged(shard))
        return rows.offset, rows.dtype

    def _damaged(self, shard: int) -> str:
        return f"{self._file(shard)}: damaged; delete it, and it is made again"

    @contextlib.contextmanager
    def filling(self) -> Iterator[None]:
        """Around `write`s: one process at a time; half-written files of a killed one are removed.

        Raises UserError where another process fills this cache.
        """
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            try:
                lock.taken(folder)
            except BlockingIOError:
                raise UserError(f"{self.folder}: another process makes this latent cache") from None
            for left in self.folder.glob(".latents-*.npy.*"):
                left.unlink(missing_ok=True)
            for left in self.folder.glob(f".{MANIFEST}.*"):
                left.unlink(missing_ok=True)
            yield
        finally:
            os.close(folder)


class Cached(Records):
    """A source whose records bring their latents along, as `record["latents"]` (s, Z), where the cache has them.

    `images(record)` are the encoded images that a record's latents are of.
    """

    def __init__(self, source: Sequence[Record], cache: LatentCache, images: Callable[[Record], Sequence[bytes]]):
        if len(source) != cache.records:
            raise ValueError(f"{source!r} has {len(source)} records, {cache.folder} those of {cache.records}")
        self._source, self._cache, self._images = source, cache, images

    def __len__(self) -> int:
        return len(self._source)

    def _at(self, index: int) -> Record:
        record = self._source[index]
        try:
            images = self._images(record)
        except Exception:  # an odd record: laying it out finds the fault again, and skips and counts it
            return record
        latents = self._cache.read(index, images) if images else None
        return record if latents is None else {**record, "latents": latents}

    def __repr__(self) -> str:
        return f"Cached({self._source!r}, {str(self._cache.folder)!r})"


def _checksum(images: Sequence[bytes]) -> int:
    """CRC-32 of images in their order; that of one alone is of its bytes."""
    found = zlib.crc32(images[0])
    for image in images[1:]:
        found = zlib.crc32(image, zlib.crc32(len(image).to_bytes(8, "little"), found))
    return found


def _sum(index: int, row: np.void) -> int:
    """CRC-32 of a row and its place: a row of zeros, or of another record, has another."""
    head = zlib.crc32(np.array([index, row["known"], row["image"]], "<u8").tobytes())
    return zlib.crc32(np.ascontiguousarray(row["latents"]).data, head)


def _flat(tree: Mapping, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value of nested dicts."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found
