"""Writes a split part by part: in parallel, and so that a run that was killed goes on where it was.

A part is a piece of a split that is read and written on its own: some thousand entries of a JSON file, one tar of a web
dataset, one parquet file. It becomes one ArrayRecord file with a sidecar, which is written last: a part without its
sidecar was never finished. The sidecar says what the part was made from; where that has changed, it is made again.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tqdm
from array_record.python import array_record_module

from latent_jax.data import checks
from latent_jax.data.builders.tally import UNLIMITED, Tally

SIZE = 1024


@dataclasses.dataclass(frozen=True)
class Part:
    """What `examples` needs to read one part, the files that it depends on, and its records where they are known."""

    place: Any
    files: tuple[Path, ...]
    label: str = ""
    size: int | None = None

    def made_from(self) -> str:
        """Changes whenever the part's files do."""
        stamps = [_stamp(file) for file in self.files]
        return hashlib.sha256(repr((self.label, self.size, stamps)).encode()).hexdigest()


def _stamp(file: Path) -> tuple[str, int, int]:
    """A file that went, or a link to nowhere or to itself, is for `examples` to count."""
    place = os.path.realpath(file)  # Path.resolve raises over a link to itself
    try:
        found = os.stat(place)
    except OSError:
        return place, -1, -1
    return place, found.st_size, found.st_mtime_ns


@dataclasses.dataclass(frozen=True)
class Record:
    """A serialised record on its way to disk. `group` names a run of records that may be opened alone (a sub-task)."""

    key: str
    data: bytes
    group: str = ""


@dataclasses.dataclass(frozen=True)
class Written:
    """The parts of a split on disk that hold records, in order; `groups` are (name, records) runs over all of them."""

    files: list[Path]
    lengths: list[int]
    bytes: int
    groups: list[tuple[str, int]]
    tally: Tally
    sums: list[dict[str, int]]  # of each file: checks.checksum


def chunks(items: list, files: tuple[Path, ...]) -> list[Part]:
    """Parts of SIZE items each, for what a single file lists."""
    parts = []
    for start in range(0, len(items), SIZE):
        its = items[start : start + SIZE]
        parts.append(Part(its, files, f"entries {start + 1} to {start + len(its)}", len(its)))
    return parts


def write(
    folder: Path,
    parts: list[Part],
    read: Callable[[Part, Tally], Iterator[Record]],
    tally: Tally,
    *,
    noun: str,
    title: str,
    workers: int,
    redo_skipped: bool = False,
) -> Written:
    """Brings `folder` to hold every part of a split, then says what it holds.

    Keys are unique over the split: a later record with the key of an earlier one is skipped and counted as a `noun`.
    `redo_skipped` makes finished parts again that had skipped records: somebody has mended the input since.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stop = threading.Event()
    sizes = [part.size for part in parts if part.size is not None]
    total = sum(sizes) if len(sizes) == len(parts) else None
    with (
        _Progress(title, total) as progress,
        concurrent.futures.ThreadPoolExecutor(workers) as pool,
    ):

        def make(index: int, repeated: frozenset[int] = frozenset()) -> None:
            target = folder / f"{index:05}"
            if stop.is_set():
                raise _Stopped
            try:
                if repeated or not _finished(target, parts[index], redo_skipped):
                    _make(target, parts[index], read, tally.split, noun, repeated, progress, stop)
                else:
                    progress(_sidecar(target)["records"])
            except BaseException:
                stop.set()  # here: this thread may begin its next part before the main thread hears of it
                raise

        try:
            _wait([pool.submit(make, index) for index in range(len(parts))])
            repeated = _repeated([folder / f"{index:05}" for index in range(len(parts))])
            _wait([pool.submit(make, index, keys) for index, keys in repeated.items()])
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    return _gather([folder / f"{index:05}" for index in range(len(parts))], tally)


class _Stopped(Exception):
    """Another part failed, or the user has had enough."""


def _make(
    target: Path,
    part: Part,
    read: Callable[[Part, Tally], Iterator[Record]],
    split: str,
    noun: str,
    repeated: frozenset[int],
    progress: Callable[[int], None],
    stop: threading.Event,
) -> None:
    """Writes target.array_record, target.npy (hashes of the keys) and, when both are whole, target.json."""
    _file(target, ".json").unlink(missing_ok=True)
    temporary = _file(target, ".tmp")
    writer = array_record_module.ArrayRecordWriter(str(temporary), "group_size:1")  # as TFDS opens it
    tally, total = Tally(split), 0
    keys: dict[int, None] = {}
    groups: list[tuple[str, int]] = []
    try:
        for record in read(part, tally):
            if stop.is_set():
                raise _Stopped
            key = _hash(record.key)
            if key in keys or key in repeated:
                tally.skip(noun, f"{part.label}: {noun} {record.key} comes twice")
                continue
            keys[key] = None
            writer.write(record.data)
            total += len(record.data)
            count = groups.pop()[1] if groups and groups[-1][0] == record.group else 0
            groups.append((record.group, count + 1))
            progress(1)
    finally:
        writer.close()
    content = {"made_from": part.made_from(), "records": len(keys), "bytes": total, "groups": groups}
    content |= {"sum": checks.checksum(temporary), "tally": tally.state()}
    os.replace(temporary, _file(target, ".array_record"))
    np.save(_file(target, ".npy"), np.fromiter(keys, np.uint64, len(keys)))
    temporary.write_text(json.dumps(content))
    os.replace(temporary, _file(target, ".json"))


def _finished(target: Path, part: Part, redo_skipped: bool) -> bool:
    """Nothing is synced to disk on the way, a part can be read again: after a crash of the machine sizes may differ."""
    try:
        sidecar = _sidecar(target)
        if (
            _file(target, ".array_record").stat().st_size != sidecar["sum"]["size"]
            or not _file(target, ".npy").stat().st_size
        ):
            return False
    except (OSError, ValueError, LookupError, TypeError):  # or of another version of this package
        return False
    skipped = set(sidecar["tally"]["skipped"]) - UNLIMITED
    return sidecar["made_from"] == part.made_from() and not (redo_skipped and skipped)


def _repeated(targets: list[Path]) -> dict[int, frozenset[int]]:
    """Part -> hashes of the keys that an earlier part has, for the parts that have any."""
    keys = [np.load(_file(target, ".npy")) for target in targets]
    every = np.concatenate(keys) if keys else np.zeros(0, np.uint64)
    if len(np.unique(every)) == len(every):
        return {}
    seen: set[int] = set()
    found: dict[int, set[int]] = {}
    for index, each in enumerate(keys):
        found[index] = seen & set(each.tolist())
        seen |= set(each.tolist())
    return {index: frozenset(its) for index, its in found.items() if its}


def _gather(targets: list[Path], tally: Tally) -> Written:
    files: list[Path] = []
    lengths: list[int] = []
    groups: list[tuple[str, int]] = []
    sums: list[dict[str, int]] = []
    total = 0
    for target in targets:
        sidecar = _sidecar(target)
        tally.add([sidecar["tally"]])
        if sidecar["records"]:
            files.append(_file(target, ".array_record"))
            lengths.append(sidecar["records"])
            total += sidecar["bytes"]
            groups += [(name, count) for name, count in sidecar["groups"]]
            sums.append(sidecar["sum"])
    return Written(files, lengths, total, groups, tally, sums)


def _wait(futures: Sequence[concurrent.futures.Future[None]]) -> None:
    """Raises the failure that stopped the others, once they have stopped."""
    concurrent.futures.wait(futures, return_when=concurrent.futures.FIRST_EXCEPTION)
    for future in futures:
        future.cancel()  # does nothing where all are done
    concurrent.futures.wait(futures)  # the first to end may be one that was stopped
    failures = [failure for future in futures if not future.cancelled() and (failure := future.exception())]
    if failures:
        raise next((failure for failure in failures if not isinstance(failure, _Stopped)), failures[0])


class _Progress:
    """A bar of records that many threads move."""

    def __init__(self, title: str, total: int | None):
        self._bar = tqdm.tqdm(desc=title, total=total, unit=" records", mininterval=1.0)
        self._lock = threading.Lock()

    def __enter__(self) -> "_Progress":
        return self

    def __call__(self, count: int) -> None:
        with self._lock:
            self._bar.update(count)

    def __exit__(self, *failure: object) -> None:
        self._bar.close()


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def _sidecar(target: Path) -> Any:
    return json.loads(_file(target, ".json").read_text())


def _file(target: Path, suffix: str) -> Path:
    return target.with_name(target.name + suffix)
