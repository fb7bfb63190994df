"""The safetensors file format, read through a memory map and written as a stream.

Reading copies nothing: every tensor is a view of file-backed pages. Writing puts the header first and then takes each
tensor piece by piece, so that a file of any size needs the memory of one piece; the safetensors package writes from
arrays held in memory. Format: 8 bytes little-endian header length, that many bytes of JSON, then the tensors.
"""

import dataclasses
import json
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from math import prod
from pathlib import Path
from typing import NoReturn

import ml_dtypes
import numpy as np

from latent_jax.errors import UserError
from latent_jax.models import sums
from latent_jax.runtime.files import checksum, naming

_DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LONGEST_HEADER = 100_000_000  # the reference implementation's limit


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor to write. `pieces()` yields its values in C order, cut anywhere."""

    dtype: np.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[np.ndarray]]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    @classmethod
    def of(cls, array: np.ndarray) -> "Entry":
        """The entry of an array that is already in memory."""
        return cls(array.dtype, array.shape, lambda: [array])


def read(path: Path, written: Mapping | None = None) -> dict[str, np.ndarray]:
    """Name -> read-only view of the file's pages, in the order of the header.

    `written`: what `write` returned of this file; its header is compared. Tensors are read later: sums.check_tensor.
    As strict as the reference implementation: the tensors cover the file's bytes after the header, each byte once.
    Raises UserError naming the file (and the tensor) if it is missing, truncated, damaged or of an unknown dtype.
    """
    path = Path(path)
    header, start = _read_header(path, None if written is None else written["header"])
    size = path.stat().st_size
    dtypes = {name: _dtype(path, name, entry) for name, entry in header.items()}
    expected = start + _covered(path, header, dtypes)
    if size != expected:
        state = "truncated" if size < expected else "longer than its header says"
        raise UserError(f"{path}: {state}: {size} bytes, expected {expected}")
    pages = np.memmap(path, np.uint8, mode="r").view(np.ndarray)
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        try:
            tensors[name] = pages[start + begin : start + end].view(dtypes[name]).reshape(entry["shape"])
        except ValueError as problem:  # more axes, or longer ones beside an empty one, than NumPy knows
            raise UserError(f"{path}: tensor '{name}' cannot have the shape {entry['shape']} ({problem})") from None
    return tensors


def in_order(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """The tensors in the order in which `write` asks for their pieces."""
    return dict(sorted(entries.items(), key=lambda item: -item[1].dtype.itemsize))


def write(path: Path, entries: Mapping[str, Entry]) -> dict:
    """Writes the tensors to a new file, header first, in falling item size (which keeps every one of them aligned).

    Returns their checksums as a folder keeps them: {"header": of the header, "tensors": {name: CRC-32}}.
    """
    entries = in_order(entries)
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}  # "format" is what transformers asks for
    offset = 0
    for name, entry in entries.items():
        header[name] = {
            "dtype": _NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.nbytes],
        }
        offset += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    sums_of: dict[str, int] = {}
    partial = path.with_name(path.name + ".partial")
    with naming(path), partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, entry in entries.items():
            before, crc = file.tell(), 0
            for piece in entry.pieces():
                if piece.dtype != entry.dtype:
                    raise TypeError(f"{name}: a piece is {piece.dtype}, announced as {entry.dtype}")
                piece = np.ascontiguousarray(piece)
                file.write(piece.reshape(-1).view(np.uint8).data)
                crc = sums.of_tensor(piece, crc)
            if file.tell() - before != entry.nbytes:
                raise ValueError(f"{name}: {file.tell() - before} bytes came, {entry.nbytes} were announced")
            sums_of[name] = crc
    os.replace(partial, path)
    return {"header": checksum(text), "tensors": sums_of}


def _read_header(path: Path, written: str | None) -> tuple[dict, int]:
    """The header without its metadata, and the offset at which the tensors start. `written`: its checksum, if known."""
    try:
        # O_NONBLOCK: opening a FIFO that nobody writes to must not wait for a writer.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise UserError(f"{path}: not a regular file; expected a safetensors file")
            length = int.from_bytes(file.read(8), "little")
            if found.st_size < 8 or length > _LONGEST_HEADER:
                raise UserError(f"{path}: not a safetensors file")
            if found.st_size < 8 + length:
                raise UserError(
                    f"{path}: truncated: {found.st_size} bytes, and the header alone takes {8 + length}; "
                    "or not a safetensors file"
                )
            text = file.read(length)
            if written is not None and checksum(text) != written:
                raise sums.damaged(path, sums.remedy(path.parent), "its header is ")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected a safetensors file") from None
    except OSError as problem:
        raise UserError(f"{path}: cannot be read ({problem.strerror})") from None
    try:
        # The format allows no byte order mark, no NaN, and no name twice; Python's json takes the last of two.
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse, parse_int=_size)
        if not isinstance(header, dict):
            raise ValueError("no JSON object")
        _check_metadata(header.pop("__metadata__", None))
        wrong = next((name for name, entry in header.items() if not _is_entry(entry)), None)
    except (ValueError, RecursionError) as problem:
        raise UserError(f"{path}: not a safetensors file (its header is damaged: {problem})") from None
    if wrong is not None:
        raise UserError(
            f"{path}: not a safetensors file (its header is damaged: tensor '{wrong[:80]}': expected dtype, shape and "
            "data_offsets of non-negative integers)"
        )
    return header, 8 + length


def _unique(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"'{next(name for name in names if names.count(name) > 1)[:80]}' stands in it twice")
    return found


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


def _size(digits: str) -> int:
    return -1 if digits.startswith("-") else int(digits)  # -0 is no size either


def _check_metadata(metadata: object) -> None:
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    ):
        raise ValueError("__metadata__ is not an object of strings")


def _is_entry(entry: object) -> bool:
    def sizes(value: object) -> bool:
        # bool is a subclass of int, and 2.0 == 2: neither is a size.
        return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**64 for n in value)

    return (
        isinstance(entry, dict)
        and isinstance(entry.get("dtype"), str)
        and sizes(entry.get("shape"))
        and sizes(entry.get("data_offsets"))
        and len(entry["data_offsets"]) == 2
    )


def _covered(path: Path, header: dict, dtypes: dict[str, np.dtype]) -> int:
    """How many bytes the tensors cover, without a hole and none of them twice. Raises UserError naming the tensor."""
    at = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        if begin != at or end < begin:
            what = "ends before it begins" if end < begin else "overlaps another" if begin < at else "follows a hole"
            raise UserError(f"{path}: tensor '{name}' {what}: bytes {begin} to {end}, expected it to begin at {at}")
        taken = prod(entry["shape"]) * dtypes[name].itemsize
        if end - begin != taken:
            raise UserError(
                f"{path}: tensor '{name}' of shape {tuple(entry['shape'])} and dtype {dtypes[name]} takes {taken} "
                f"bytes, but the header gives it {end - begin}"
            )
        at = end
    return at


def _dtype(path: Path, name: str, entry: dict) -> np.dtype:
    if entry["dtype"] not in _DTYPES:
        raise UserError(f"{path}: tensor '{name}' has dtype {entry['dtype']}, expected one of {', '.join(_DTYPES)}")
    return _DTYPES[entry["dtype"]]
