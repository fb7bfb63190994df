"""Checksums of a model folder: written with it, compared wherever it is read.

checksums.json is sealed (runtime/files.py) and holds

    {"files": {name: SHA-256}, "weights": {file: {"header": checksum, "tensors": {name: CRC-32}}}}

Small files are compared when a folder is opened; a tensor when it is first read, so that no shard is read for the sake
of its checksum. README.md is the owner's to edit. A folder without checksums, as published ones are, is taken as it is.
"""

import hashlib
import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from latent_jax.errors import UserError
from latent_jax.runtime import files

FILE = "checksums.json"
CARD = "README.md"
Weights = Mapping[str, Mapping]


def write(directory: str | Path, weights: Weights | None = None) -> None:
    """Writes the checksums of all that stands in `directory`; of weights those that `tensor_files.write` returned."""
    weights, directory = weights or {}, Path(directory)
    small = [file for file in sorted(directory.iterdir()) if file.name not in {*weights, CARD, FILE}]
    content = {"files": {file.name: of_file(file) for file in small}, "weights": weights}
    files.write_text(directory / FILE, files.as_json(files.sealed(content)))


def check(directory: str | Path, advice: str = "") -> Weights:
    """Compares the small files of a folder. Returns the checksums of its weights, {} where it has none.

    Raises UserError naming the file that is missing or not as it was written, and what to do: `advice`, or what holds
    for every folder.
    """
    directory, where = Path(directory), place(directory)
    if not where.exists():
        return {}
    known, advice = _read(where), advice or remedy(directory)
    weights = known["weights"]
    for name in (*known["files"], *weights):
        if not (directory / name).is_file():
            raise UserError(f"{directory / name}: missing; {advice}")
    for name, digest in known["files"].items():
        if of_file(directory / name) != digest:
            raise damaged(directory / name, advice)
    return weights


def complete(directory: str | Path) -> bool:
    """Whether every file stands there that was written with the checksums; nothing is read but these."""
    directory = Path(directory)
    try:
        known = _read(place(directory))
    except UserError:
        return False
    return all((directory / name).is_file() for name in (*known["files"], *known["weights"]))


def check_tensor(file: Path, name: str, tensor: np.ndarray, crc: int | None) -> None:
    """Raises UserError where a tensor of `file` is not the one that was written."""
    if crc != of_tensor(tensor):
        raise damaged(file, remedy(file.parent), f"tensor '{name}' is ")


def damaged(file: Path, advice: str, what: str = "") -> UserError:
    return UserError(f"{file}: {what}damaged, or changed since it was written (its checksum differs); {advice}")


def of_file(file: Path) -> str:
    return hashlib.sha256(files.read_bytes(file)).hexdigest()


def of_tensor(tensor: np.ndarray, before: int = 0) -> int:
    """CRC-32 of a tensor's bytes in C order; `before`: that of the pieces which stand before this one."""
    return zlib.crc32(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data, before)


def place(directory: Path) -> Path:
    """Where a folder's checksums stand: in it, or beside it where copies of the folder are there to be changed."""
    whole = Path(os.path.abspath(directory))  # "." and ".." have a name too
    inside, beside = directory / FILE, whole.parent / f"{whole.name}.{FILE}"
    return beside if beside.exists() and not inside.exists() else inside


def remedy(directory: Path) -> str:
    return (
        "expected what was written with the others: copy the folder again; or, where the change is meant, remove "
        f"{place(directory)} (convert writes a new one)"
    )


def _read(where: Path) -> dict:
    advice = "copy it again, or remove it to take them as they are"
    try:
        known = files.opened(files.read_json(where, expected="the checksums of the files beside it"))
    except UserError as problem:
        raise UserError(f"{problem}; {advice}") from None
    except ValueError as problem:
        raise UserError(
            f"{where}: damaged: {problem}; expected the checksums of the files beside it: {advice}"
        ) from None
    if known.keys() != {"files", "weights"}:
        known = {"files": known, "weights": {}}  # as workdirs had it first
    if not (_are(known["files"], str) and _are(known["weights"], _is_written)):
        raise UserError(f"{where}: expected the checksums of the files beside it, as latent_jax writes them")
    return known


def _are(found: object, kind: type | Callable[[object], bool]) -> bool:
    is_one = kind if not isinstance(kind, type) else lambda value: type(value) is kind
    return isinstance(found, dict) and all(map(is_one, found.values()))


def _is_written(found: object) -> bool:
    return isinstance(found, dict) and isinstance(found.get("header"), str) and _are(found.get("tensors"), int)
