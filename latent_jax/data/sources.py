"""Random access to prepared datasets: ArrayRecord files, as TFDS wrote them, to Records.

A Record is a plain dict, the same for every source: `key` (str), `images` (encoded files), `captions` (str),
`questions` (dicts with `id`, `question`, `answer` and the official fields), `dataset` (its builder's name). Nothing
here imports TensorFlow.
"""

import abc
import bisect
import hashlib
import itertools
import json
import operator
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, SupportsIndex, overload

import numpy as np
from jaxtyping import Int

from latent_jax.data import checks
from latent_jax.errors import UserError, one_line
from latent_jax.runtime import files

Record = dict[str, Any]
# Name -> the builder that prepares it. The procedural world comes in the forms of several.
BUILDER_OF = {
    "coco_captions": "coco_captions",
    "conceptual_captions": "conceptual_captions",
    "laion": "laion",
    "gqa": "gqa",
    "scienceqa": "scienceqa",
    "blink": "blink",
    "vstar": "vstar",
    "mmvp": "mmvp",
    "vsp": "vsp",
    "scenes": "coco_captions",
    "scenes_questions": "gqa",
    "scenes_scienceqa": "scienceqa",
    "scenes_blink": "blink",
    "scenes_vsp": "vsp",
}
_FORM = "records2"  # how prepared records are laid out: builders.base, whose VERSION goes with it
_FEATURES = {"key", "images", "helper_images", "captions", "questions", "extra"}


class Damaged(UserError):
    """A shard that cannot be read back. Not a bad record, which is skipped: the disk or a copy is at fault."""


class Records(Sequence[Record]):
    """Random access to records. A slice is a list of them."""

    @overload
    def __getitem__(self, index: SupportsIndex) -> Record: ...

    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...

    def __getitem__(self, index: SupportsIndex | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self._at(place) for place in range(len(self))[index]]
        place = operator.index(index)
        if not -len(self) <= place < len(self):
            raise IndexError(f"{self!r} has {len(self)} records, not {place}")
        return self._at(place % len(self))

    def __iter__(self) -> Iterator[Record]:
        return (self._at(place) for place in range(len(self)))

    @abc.abstractmethod
    def _at(self, index: int) -> Record:
        """The record at a place from 0 to len(self) - 1."""


class Source(Records):
    """One split of a prepared dataset, or one `group` (a sub-task) of it. Safe in threads; pickles by path."""

    def __init__(self, folder: Path, split: str, group: str = ""):
        self._folder, self._split, self._group = folder, split, group
        self._open()

    def _open(self) -> None:
        import tensorflow_datasets as tfds

        builder = _builder(self._folder)
        if self._split not in builder.info.splits:
            raise UserError(f"{self._folder}: no split {self._split!r}, it has {', '.join(builder.info.splits)}")
        if set(builder.info.features) != _FEATURES:
            raise UserError(f"{self._folder}: prepared by another version of this package; remove it and prepare again")
        # Raw bytes: TFDS's own parsing of these records into numpy takes five times as long.
        info = builder.info.splits[self._split]
        self._shards, self._shard_ends = _shards(info), list(itertools.accumulate(info.shard_lengths))
        checks.sums(self._folder, self._shards)
        try:
            self._bytes = builder.as_data_source(
                split=self._split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
            )
        except Exception as problem:  # TFDS and ArrayRecord raise almost anything on broken files
            raise UserError(f"{self._folder}: cannot be opened, prepare again ({one_line(problem)[:200]})") from None
        self._runs = self._find_group() if self._group else [(0, len(self._bytes))]
        self._ends = list(itertools.accumulate(end - start for start, end in self._runs))

    def _find_group(self) -> list[tuple[int, int]]:
        """(first, one past the last) record of each run of the group."""
        file = self._folder / "groups.json"
        runs = files.read_json(file)[self._split] if file.exists() else []
        ends = list(itertools.accumulate(count for _, count in runs))
        if (ends or [0])[-1] not in (0, len(self._bytes)):
            raise UserError(f"{file}: damaged: it tells of {ends[-1]} records, {self._split} has {len(self._bytes)}")
        found = [(end - count, end) for (name, count), end in zip(runs, ends, strict=True) if name == self._group]
        if not found:
            names = ", ".join(dict.fromkeys(name for name, _ in runs)) or "none"
            raise UserError(f"{self._folder}: {self._split} has no part {self._group!r}; parts: {names}")
        return found

    def __len__(self) -> int:
        return self._ends[-1]

    def _at(self, index: int) -> Record:
        run = bisect.bisect_right(self._ends, index)
        place = self._runs[run][1] - self._ends[run] + index
        try:
            record = _record(self._bytes[place])
        except Exception as problem:  # ArrayRecord's RuntimeError; what follows where another file took its place
            shard = bisect.bisect_right(self._shard_ends, place)
            file = self._folder / self._shards[shard] if shard < len(self._shards) else self._folder
            raise Damaged(
                f"{file}: damaged: record {place} cannot be read; copy it again or prepare the dataset again "
                f"({one_line(problem)[:200]})"
            ) from None
        return {**record, "dataset": self._folder.parent.name}

    def __repr__(self) -> str:
        group = f", {self._group!r}" if self._group else ""
        return f"Source({os.fspath(self._folder)!r}, {self._split!r}{group})"

    def __getstate__(self) -> tuple[Path, str, str]:
        return self._folder, self._split, self._group

    def __setstate__(self, state: tuple[Path, str, str]) -> None:
        self._folder, self._split, self._group = state
        self._open()


class Joined(Records):
    """Records of the images that two sources share, with the captions of one and the questions of the other."""

    def __init__(self, captions: Sequence[Record], questions: Sequence[Record]):
        places = {_number(record["key"]): place for place, record in enumerate(questions)}
        numbers = ((place, _number(record["key"])) for place, record in enumerate(captions))
        self._pairs = [(place, places[number]) for place, number in numbers if number in places]
        self._captions, self._questions = captions, questions
        if not self._pairs:
            raise UserError(f"{captions!r} and {questions!r} have no image in common")

    def __len__(self) -> int:
        return len(self._pairs)

    def _at(self, index: int) -> Record:
        captions, questions = self._pairs[index]
        return {
            **self._questions[questions],
            **self._captions[captions],
            "questions": self._questions[questions]["questions"],
        }


class Subset(Records):
    """Records of a source at some places of it."""

    def __init__(self, source: Sequence[Record], places: Int[np.ndarray, " X"]):
        self._source, self._places = source, places

    def __len__(self) -> int:
        return len(self._places)

    def _at(self, index: int) -> Record:
        return self._source[int(self._places[index])]


def share(source: Sequence[Record], part: float, seed: int) -> Subset:
    """A random part of a source's records, at least one: the first of an order that `seed` draws, so that a smaller
    share is part of a larger one."""
    order = np.random.default_rng(seed).permutation(len(source))
    return Subset(source, order[: max(1, round(part * len(source)))])


def held_out(name: str, data: Any, split: str, seed: int) -> Records:
    """What a run (`data`: its section of the config) does not train on: its holdout, else a split of that name."""
    if data.holdout:
        return hold_out(open_source(name, data.path, data.split), data.holdout, seed)[1]
    return open_source(name, data.path, split)


def first(source: Sequence[Record], count: int) -> list[Record]:
    """The first `count` records; 0: all."""
    return [source[index] for index in range(min(count or len(source), len(source)))]


def hold_out(source: Sequence[Record], count: int, seed: int) -> tuple[Subset, Subset]:
    """(the remaining records, `count` records that a seed draws), each in the source's order.

    Raises UserError where nothing would be left.
    """
    if count >= len(source):
        raise UserError(f"config.data.holdout: got {count}, expected fewer than the {len(source)} records of the split")
    held = np.random.default_rng([seed, 1]).permutation(len(source))[:count]
    kept = np.setdiff1d(np.arange(len(source)), held)
    return Subset(source, kept), Subset(source, np.sort(held))


def open_source(name: str, path: str | os.PathLike, split: str) -> Source:
    """Opens `split` of a prepared dataset: `name` is one of BUILDER_OF, `path` the --output of `latent_jax.prepare`.

    `blink/Jigsaw` opens one sub-task. The names of `scenes` with an empty path are generated and prepared on first
    use, each form alone, into $LATENT_JAX_CACHE or ~/.cache/latent_jax.
    Raises UserError naming the missing dataset and the command that makes it.
    """
    _, _, group = name.partition("/")
    return Source(_folder(name, path), split, group)


def split_names(name: str, path: str | os.PathLike) -> list[str]:
    """The splits that `open_source` can open. Raises as it does."""
    return list(_builder(_folder(name, path)).info.splits)


def fingerprint(name: str, path: str | os.PathLike, split: str) -> str:
    """A short hash of the records that `open_source` opens. It does not depend on the files' place.

    Reads no records: it is made of prepare's checksums, or of the sizes of the files where prepare wrote none.
    """
    folder = _folder(name, path)
    splits = _builder(folder).info.splits
    if split not in splits:
        raise UserError(f"{folder}: no split {split!r}, it has {', '.join(splits)}")
    info = splits[split]
    _, _, group = name.partition("/")
    content = [folder.parent.name, split, group, list(info.shard_lengths), info.num_bytes]
    content.append(list(checks.sums(folder, _shards(info)).values()))
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _builder(folder: Path) -> Any:
    """TFDS's builder of a prepared dataset. Raises UserError that names the file that is broken."""
    for name in ("dataset_info.json", "features.json"):
        files.read_json(folder / name)
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_from_directory(folder)
        for info in builder.info.splits.values():
            if not _shards(info) or not info.num_examples:
                raise ValueError(f"split {info.name} has no records")
        return builder
    except Exception as problem:  # protobuf's, TFDS's and Python's own
        said = one_line(problem)[:200] or type(problem).__name__
        raise UserError(f"{folder / 'dataset_info.json'}: damaged, prepare the dataset again ({said})") from None


def _shards(info: Any) -> list[str]:
    """File names of a split in the order of its records."""
    return [os.path.basename(str(file)) for file in sorted(info.filenames)]


def _folder(name: str, path: str | os.PathLike) -> Path:
    """Where the newest version of a prepared dataset lies."""
    name = name.partition("/")[0]
    if name not in BUILDER_OF:
        raise UserError(f"data.name={name!r}: expected one of {', '.join(BUILDER_OF)}")
    made = name.startswith("scenes")
    dataset = "scenes" if name == "scenes_questions" else name
    command = f"python -m latent_jax.prepare --dataset={dataset}{'' if made else ' --raw=RAW'}"
    if not os.fspath(path):
        if not made:
            raise UserError(
                f"data.path is empty: {name} is not part of the package; prepare it with {command} "
                "--output=DIR and set data.path=DIR"
            )
        path = _cached(dataset)
    folder, command = Path(path) / BUILDER_OF[name], f"{command} --output={path}"
    versions = _versions(folder)
    if versions and (not made or _is_made(name, Path(path))):
        return versions[-1].parent
    here = [other for other in dict.fromkeys(BUILDER_OF.values()) if _versions(Path(path) / other)]
    if here:
        raise UserError(
            f"data.name={name}: {path} holds {', '.join(here)} and not {name}; name what is there, "
            f"or make {name} elsewhere with {command.rpartition('=')[0]}=DIR"
        )
    for around in (Path(path), Path(path).parent):
        if around.name == BUILDER_OF[name] and _versions(around):
            raise UserError(f"{path}: lies inside a prepared dataset; set data.path={around.parent}")
    raise UserError(f"{folder}: no prepared dataset here; make it with {command}")


def _versions(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.*.*/dataset_info.json"))


def _is_made(name: str, path: Path) -> bool:
    """Whether `path` holds the procedural world, and not a dataset of one's own in the same form.

    What it was made from lies beside it as raw/; somebody may have removed that. Captions and questions of `scenes`
    are about the same images, split by split.
    """
    official = "coco" if name == "scenes" else BUILDER_OF[name]
    if (path / "raw" / official).is_dir() or name not in ("scenes", "scenes_questions"):
        return True
    both = [_versions(path / other) for other in ("coco_captions", "gqa")]
    if not all(both):
        return False
    captions, questions = (_builder(found[-1].parent).info.splits for found in both)
    return {n: i.num_examples for n, i in captions.items()} == {n: i.num_examples for n, i in questions.items()}


def join(captions: Sequence[Record], questions: Sequence[Record]) -> Joined:
    """Records with the captions of one source and the questions of another, for the images that both have.

    COCO's image id and GQA's imageId are compared as numbers where they are numbers. Of `scenes`, captions[0] is the
    full one, from which the image is determined. Reads both sources once.
    """
    return Joined(captions, questions)


def _number(key: str) -> int | str:
    return int(key) if key.isdecimal() else key


def _record(data: bytes) -> Record:
    """The Record that a serialised tf.train.Example holds."""
    from tensorflow_datasets.proto import tf_example_pb2

    features = tf_example_pb2.Example.FromString(data).features.feature

    def values(name: str) -> Sequence[bytes]:
        return features[name].bytes_list.value

    extra, helpers = values("extra")[0], values("helper_images")
    return {
        "key": values("key")[0].decode(),
        "images": list(values("images")),
        "captions": [caption.decode() for caption in values("captions")],
        "questions": [json.loads(question) for question in values("questions")],
        **({"helper_images": list(helpers)} if helpers else {}),
        **(json.loads(extra) if extra else {}),
    }


def _cached(dataset: str) -> Path:
    """The default world in one of its forms, made once. Of two processes that make it at once, the first is kept."""
    from latent_jax.data import scenes
    from latent_jax.data.builders.build import build_scenes, build_scenes_benchmark

    benchmark = dataset.removeprefix("scenes").removeprefix("_")
    sizes = scenes.BENCHMARK_SIZES[benchmark] if benchmark else scenes.SIZES
    counts = "-".join(str(size) for size in sizes.values())
    folder = files.cache_directory() / f"{dataset}-{scenes.VERSION}-{_FORM}-seed0-{counts}"
    if not folder.exists():
        print(f"{dataset}: making {sum(sizes.values())} images, once, into {folder}", file=sys.stderr)
        try:
            if benchmark:
                build_scenes_benchmark(benchmark, folder, sizes=sizes, wait=True)
            else:
                build_scenes(folder, sizes=sizes, wait=True)
        except UserError:
            if not folder.exists():
                raise
    return folder
