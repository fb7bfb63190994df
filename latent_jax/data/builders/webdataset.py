"""Image-caption shards of img2dataset: 00000.tar with KEY.jpg, KEY.txt and KEY.json, and 00000.parquet beside it."""

import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from latent_jax.data.builders.base import record
from latent_jax.data.builders.files import check_image, is_text, split_name
from latent_jax.data.builders.parquet import PARQUET_ERRORS
from latent_jax.data.builders.parts import Part, Record
from latent_jax.data.builders.tally import Tally
from latent_jax.data.images import MOST_BYTES
from latent_jax.errors import one_line

_IMAGES = ("jpg", "jpeg", "png", "webp")
_BLOCK = tarfile.BLOCKSIZE
_BARE = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)
# What img2dataset says about the download itself; the caption and the key stand elsewhere.
_NOT_META = ("caption", "key", "status", "error_message", "exif")


def find(raw: Path) -> dict[str, list[Path]]:
    """Split -> shards: those in train/, val/ ... are of that split, those in the folder itself of the split that their
    name says (cc3m-validation-0000.tar), else of `train`."""
    found: dict[str, list[Path]] = {}
    for file in sorted([*raw.glob("*.tar"), *raw.glob("*/*.tar")]):
        split = _named_split(file.stem) if file.parent == raw else split_name(file.parent.name)
        found.setdefault(split, []).append(file)
    return found


def _named_split(stem: str) -> str:
    words = re.split(r"[^a-z]+", stem.lower())
    return next(
        (split_name(word) for word in words if word in ("train", "val", "valid", "validation", "test")), "train"
    )


def parts(shards: list[Path]) -> list[Part]:
    """A part is a shard."""
    listed = []
    for shard in shards:
        beside = shard.with_suffix(".parquet")
        listed.append(Part(shard, (shard, beside) if beside.exists() else (shard,), shard.name))
    return listed


def examples(shard: Path, tally: Tally) -> Iterator[Record]:
    """Records of one shard. Whatever it should hold and does not is counted: see `members` and `_compare`."""
    keys = set()
    for key, fields in _samples(shard, tally):
        keys |= {key, key.rpartition("/")[2]}
        tally.see("image")
        try:
            made = _record(key, fields)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            tally.skip("image", f"{shard}: {key}: {error}")
        else:
            yield made
    _compare(shard.with_suffix(".parquet"), keys, tally)


def _record(key: str, fields: dict[str, list[bytes]]) -> Record:
    if repeated := [field for field, values in fields.items() if len(values) > 1]:
        raise ValueError(f"has {repeated[0]} twice")
    suffix = next((suffix for suffix in _IMAGES if suffix in fields), None)
    if suffix is None:
        raise ValueError("no image")
    meta = {}
    if "json" in fields:
        try:
            meta = json.loads(fields["json"][0])
        except (ValueError, RecursionError) as error:
            raise ValueError(f"json cannot be read ({error})") from None
    if not isinstance(meta, dict):
        raise ValueError("json is no object")
    caption = fields["txt"][0].decode("utf-8", "replace") if "txt" in fields else meta.get("caption")
    if not is_text(caption):
        raise ValueError("no caption")
    image = check_image(fields[suffix][0], f"{key}.{suffix}")
    kept = {
        name: value for name, value in meta.items() if name not in _NOT_META and isinstance(value, str | int | float)
    }
    extra: dict[str, Any] = {"meta": kept} if kept else {}
    return record(key, images=[image], captions=[caption.strip()], **extra)


def _samples(shard: Path, tally: Tally) -> Iterator[tuple[str, dict[str, list[bytes]]]]:
    """(key, {suffix: [contents]}): a sample is a run of members of one path up to the first dot of its last name."""
    key = ""
    fields: dict[str, list[bytes]] = {}
    for name, data in members(shard, tally):
        folder, slash, base = name.removeprefix("./").rpartition("/")
        its, _, suffix = base.partition(".")
        its = folder + slash + its
        if its != key and fields:
            yield key, fields
            fields = {}
        key = its
        fields.setdefault(suffix.lower(), []).append(data)
    if fields:
        yield key, fields


def members(shard: Path, tally: Tally) -> Iterator[tuple[str, bytes]]:
    """(name, content) of a tar's files.

    Goes on behind a header that cannot be read, where Python's reader stops, most often without a word; says so, and
    also where the archive ends too early.
    """
    if not shard.is_file():
        _lost(shard, "not a regular file", tally)
        return
    size, offset, lost_from, ended, long_name, cut = shard.stat().st_size, 0, None, False, None, None
    with shard.open("rb") as file:
        while offset + _BLOCK <= size:
            file.seek(offset)
            header = file.read(_BLOCK)
            try:
                member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
                if member.size < 0:  # base-256 numbers have a sign
                    raise tarfile.HeaderError("negative size")
            except (tarfile.HeaderError, ValueError, OverflowError):
                ended = header == bytes(_BLOCK)
                if not ended and lost_from is None:
                    lost_from = offset
                offset += _BLOCK
                continue
            if lost_from is not None:
                _lost(shard, f"{offset - lost_from} bytes before {member.name} cannot be read", tally)
                lost_from = long_name = cut = None
            ended = False
            if member.size and member.type in _BARE:
                member.size = 0  # a folder or a link has no content, whatever its header says
            if offset + _BLOCK + member.size > size:  # the archive ends here, or the size is wrong: the rest will tell
                lost_from, cut = offset, long_name or member.name
                offset += _BLOCK
                continue
            offset += _BLOCK + -(-member.size // _BLOCK) * _BLOCK
            if member.size > MOST_BYTES:
                _lost(shard, f"{long_name or member.name} has {member.size:,} bytes, expected an image", tally)
                long_name = None
                continue
            if member.type in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME):
                long_name = _long_name(member.type, file.read(member.size)) or long_name
            elif member.isreg():
                yield long_name or member.name, file.read(member.size)
                long_name = None
    if cut is not None:
        _lost(shard, f"cut off in {cut}", tally)
    elif lost_from is not None:
        _lost(shard, f"not a tar archive from byte {lost_from} on", tally)
    elif not ended:
        _lost(shard, f"cut off after {offset} bytes", tally)


def _long_name(kind: bytes, data: bytes) -> str | None:
    """The name of the next member, if this header gives it one."""
    if kind == tarfile.GNUTYPE_LONGNAME:
        return data.rstrip(b"\0").decode("utf-8", "replace")
    found = re.search(rb"\d+ path=([^\n]+)\n", data)
    return found[1].decode("utf-8", "replace") if found else None


def _lost(shard: Path, reason: str, tally: Tally) -> None:
    """At least one record; how many, only the parquet beside the shard can tell."""
    tally.see("image")
    tally.skip("image", f"{shard}: {reason}")


def _compare(file: Path, keys: set[str], tally: Tally) -> None:
    """Counts what the parquet beside a shard lists and the shard has not."""
    if not file.is_file():
        return
    tally.see("list")
    try:
        names = pq.read_schema(file).names
        table = pq.read_table(file, columns=[name for name in ("key", "status", "error_message") if name in names])
        rows = table.to_pylist()
    except PARQUET_ERRORS as error:
        tally.skip("list", f"{file}: cannot be read, failed downloads are not counted ({one_line(error)[:200]})")
        return
    if "key" not in names or "status" not in names:
        return
    for row in rows:
        if row["status"] == "success":
            if str(row["key"]) not in keys:
                tally.see("image")
                tally.skip("image", f"{file}: {row['key']} was downloaded, but is not in the tar")
        else:
            tally.skip("download", f"{file}: {row['key']}: {row['status']} ({row.get('error_message')})")
    tally.see("download", len(rows))
