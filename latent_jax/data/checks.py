"""Checksums of prepared shards: written beside them, and looked at before they are trusted.

checksums.json is {shard: {"size": bytes, "crc32": of the file, "ends": of its first and its last MiB}}. Opening
compares sizes and ends, without reading terabytes: this distinguishes the shards of a set. The content is checked
where it is read, by the hashes that ArrayRecord keeps of every chunk. A shard that its owner has rewritten is not
damaged; its ends differ, so the data counts as another. Two prepared datasets with equal checksums are the same.
Earlier versions wrote no ends; those of a shard of two MiB or less are the whole shard.
"""

import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from latent_jax.errors import UserError
from latent_jax.runtime import files

FILE = "checksums.json"
_END = 2**20
_SHAPE = '{"shard": {"size", "crc32"}, ...}'


def checksum(file: Path) -> dict[str, int]:
    """Size, CRC-32 and CRC-32 of the ends of a file."""
    size, crc = 0, 0
    with file.open("rb") as content:
        while data := content.read(2**20):
            size, crc = size + len(data), zlib.crc32(data, crc)
    return {"size": size, "crc32": crc, "ends": _ends(file, size)}


def _ends(file: Path, size: int) -> int:
    """CRC-32 of the first and the last MiB; of less than two, of all."""
    with file.open("rb") as content:
        crc = zlib.crc32(content.read(_END))
        content.seek(max(size - _END, min(size, _END)))
        return zlib.crc32(content.read(), crc)


def sums(folder: Path, shards: Iterable[str]) -> dict[str, dict[str, int]]:
    """Checksums of `shards`; sizes and ends are compared with the files. Where prepare wrote none: their sizes.

    With the ends that are there, where they are others. Raises UserError that names a shard that is missing, has
    another size than prepare wrote, or is another one of the set.
    """
    known = files.read_json(folder / FILE, dict, _SHAPE) if (folder / FILE).exists() else None
    found = {}
    for shard in shards:
        file = folder / shard
        if not file.is_file():
            raise UserError(f"{file}: missing; copy it again or prepare the dataset again")
        found[shard] = {"size": file.stat().st_size}
        if known is None:
            continue
        wanted = known.get(shard)
        if not isinstance(wanted, dict) or not {"size", "crc32"} <= wanted.keys():
            raise UserError(f"{folder / FILE}: expected {_SHAPE}, but {shard} is not in it")
        if wanted["size"] != found[shard]["size"]:
            raise UserError(
                f"{file}: damaged: {found[shard]['size']:,} bytes, prepare wrote {wanted['size']}; copy it again or "
                "prepare the dataset again"
            )
        found[shard] = {"size": wanted["size"], "crc32": wanted["crc32"]}
        own, written = _ends(file, wanted["size"]), _written_ends(wanted)
        if written in (None, own):
            continue
        if taken := [name for name, other in known.items() if name != shard and _written_ends(other) == own]:
            raise UserError(
                f"{file}: is the shard {taken[0]} under another name (checksum); copy it again or prepare the dataset "
                "again"
            )
        found[shard]["ends"] = own
    return found


def _written_ends(entry: Any) -> int | None:
    """The ends of a shard as prepare wrote them, where they are known."""
    if not isinstance(entry, dict) or not {"size", "crc32"} <= entry.keys():
        return None
    return entry.get("ends", entry["crc32"] if entry["size"] <= 2 * _END else None)
