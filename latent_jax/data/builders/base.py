"""What the builders share: they read a folder that the user has, in one form of record, and count what they skip."""

import abc
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

from latent_jax.data import checks
from latent_jax.data.builders import parts
from latent_jax.data.builders.files import as_json, is_unicode
from latent_jax.data.builders.parts import Part, Record, Written
from latent_jax.data.builders.tally import Tally
from latent_jax.errors import UserError, one_line
from latent_jax.runtime.files import write_text

T = TypeVar("T")
# What Python raises over values of another type or shape than the code expects.
_ODD = (TypeError, LookupError, AttributeError, OverflowError, RecursionError)


def record(
    key: str,
    *,
    images: Sequence[bytes] = (),
    captions: Sequence[str] = (),
    questions: Sequence[dict | str] = (),
    helper_images: Sequence[bytes] = (),
    group: str = "",
    **extra: Any,
) -> Record:
    """A record of the one form that every builder writes; `extra` are further keys of the Record, plain values.

    A question may come as its JSON text. Raises ValueError where a text is no Unicode.
    """
    if not all(map(is_unicode, (key, *captions))):
        raise ValueError("a text with a lone surrogate, which is no character")
    values = {
        "key": [key.encode()],
        "images": images,
        "helper_images": helper_images,
        "captions": [caption.encode() for caption in captions],
        "questions": [(q if isinstance(q, str) else as_json(q)).encode() for q in questions],
        "extra": [as_json(extra).encode() if extra else b""],
    }
    lists = {name: tf_feature_pb2.BytesList(value=value) for name, value in values.items()}
    features = tf_feature_pb2.Features(
        feature={name: tf_feature_pb2.Feature(bytes_list=value) for name, value in lists.items()}
    )
    # TFDS's own writer leaves the order of the features to the process: the same input would give other bytes.
    return Record(key, tf_example_pb2.Example(features=features).SerializeToString(deterministic=True), group)


def each(
    items: Iterable[T], noun: str, tally: Tally, make: Callable[[T], Record], name: Callable[[T], str] = str
) -> Iterator[Record]:
    """The records that `make` gives of `items`; one that it cannot make is a skipped `noun`, whatever made it odd.

    A ValueError says itself what is wrong. Anything else is of a kind that nobody thought of: `name` says which item.
    """
    for item in items:
        tally.see(noun)
        try:
            made = make(item)
        except ValueError as error:
            tally.skip(noun, str(error))
        except _ODD as error:
            tally.skip(noun, f"{noun} {name(item)[:80]}: {type(error).__name__}: {one_line(error)}")
        else:
            yield made


# TFDS has no annotations that the checker reads: it knows no keyword of its classes.
class RawBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """A TFDS builder over official files in `raw`.

    A subclass states `name`, NOUN, `find() -> {split: place}`, `parts(place, tally)`, which lists the parts of a split,
    and `examples(part, tally)`, the usable records of one. Records keep the files' order. After `build`, `tallies` say
    what was skipped. `work` is a folder in which finished parts are kept until the whole is there.
    """

    VERSION = tfds.core.Version("2.0.0")
    NOUN = "image"
    PUBLISHED: dict[str, int] = {}  # records of the published splits: another number is another version, or a part

    def __init_subclass__(cls, *, skip_registration: bool = True, **options: Any) -> None:
        """Stays out of the registry of TFDS, which has a coco_captions of its own."""
        super().__init_subclass__(skip_registration=skip_registration, **options)

    def __init__(
        self, *, raw: Path, work: Path, max_bad: float, workers: int | None = None, called: str = "", **options: Any
    ):
        self.called = called or self.name  # what the bars say
        self.raw, self.work = Path(raw), Path(work)
        self.tallies: list[Tally] = []
        self._max_bad, self._workers = max_bad, workers or os.cpu_count() or 1
        super().__init__(file_format="array_record", **options)

    @abc.abstractmethod
    def find(self) -> dict[str, Any]:
        """Split -> where its records are."""

    @abc.abstractmethod
    def parts(self, place: Any, tally: Tally) -> list[Part]:
        """What can be read on its own; tallies what cannot be used of the file that lists it."""

    @abc.abstractmethod
    def examples(self, part: Part, tally: Tally) -> Iterator[Record]:
        """Every usable record of a part. Called from several threads."""

    def build(self) -> None:
        """Writes `data_dir`/NAME/VERSION. Raises UserError where the files are not what they should be."""
        if not self.raw.is_dir():
            raise UserError(f"{self.raw}: no such folder, expected {self.name} in its official form")
        with tempfile.TemporaryDirectory() as unused:  # TFDS insists on making a download folder
            self.download_and_prepare(
                download_dir=unused, download_config=tfds.download.DownloadConfig(try_download_gcs=False)
            )

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Sequence(tfds.features.Text())
        images = tfds.features.Sequence(tfds.features.Image())
        features = {"key": tfds.features.Text(), "images": images, "helper_images": images}
        features |= {"captions": text, "questions": text, "extra": tfds.features.Text()}
        return tfds.core.DatasetInfo(
            builder=self,
            description=type(self).__doc__,
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,
        )

    def _download_and_prepare(self, dl_manager: Any, download_config: Any) -> None:
        """TFDS would keep a split in memory or write it twice, from one thread, and start again after a kill."""
        infos: list[tfds.core.SplitInfo] = []
        groups: dict[str, list[tuple[str, int]]] = {}
        sums: dict[str, dict[str, int]] = {}
        for split, place in self._shaped(self.find).items():
            written = self._write(split, place)
            template = self._get_filename_template(split_name=split)
            for index, file in enumerate(written.files):
                target = template.sharded_filepath(shard_index=index, num_shards=len(written.files))
                _link(file, target)
                sums[target.name] = written.sums[index]
            infos.append(
                tfds.core.SplitInfo(
                    name=split,
                    shard_lengths=written.lengths,
                    num_bytes=written.bytes,
                    filename_template=template,
                )
            )
            groups[split] = written.groups
        self.info.set_splits(tfds.core.splits.SplitDict(infos))
        self._write_extras(groups)
        write_text(Path(self.data_path) / checks.FILE, json.dumps(sums, indent=1) + "\n")

    def _shaped(self, read: Callable[..., T], *arguments: Any) -> T:
        try:
            return read(*arguments)
        except _ODD as error:
            said = f"{type(error).__name__}: {one_line(error)}"
            raise UserError(f"{self.raw}: not {self.name} in its official form ({said})") from None

    def _write(self, split: str, place: Any) -> Written:
        tally = Tally(split)
        self.tallies.append(tally)
        failed = self.work / f"{split}.failed"
        listed = self._shaped(self.parts, place, tally)
        written = parts.write(
            self.work / split,
            listed,
            self.examples,
            tally,
            noun=self.NOUN,
            title=f"{self.called} {split}",
            workers=self._workers,
            redo_skipped=failed.exists() and float(failed.read_text()) >= self._max_bad,
        )
        failed.unlink(missing_ok=True)
        try:
            tally.check(self._max_bad)
        except UserError:
            # Whoever comes again with a larger share keeps what is done; else the input must have been mended.
            write_text(failed, str(self._max_bad))
            raise
        if not written.lengths:
            raise UserError(f"{self.raw}: split {split} has no usable record")
        if split in self.PUBLISHED and sum(written.lengths) != self.PUBLISHED[split]:
            tally.note(f"{sum(written.lengths)} records, where the published split has {self.PUBLISHED[split]}")
        return written

    def _write_extras(self, groups: dict[str, list[tuple[str, int]]]) -> None:
        """Every skipped record, one a line, and where the groups of each split are."""
        lines = [
            json.dumps({"split": tally.split, "kind": kind, "reason": reason, "records": count})
            for tally in self.tallies
            for kind, reason, count in tally.skipped()
        ]
        write_text(Path(self.data_path) / "skipped.jsonl", "".join(f"{line}\n" for line in lines))
        if any(name for runs in groups.values() for name, _ in runs):
            write_text(Path(self.data_path) / "groups.json", json.dumps(groups))

    def _split_generators(self, dl_manager: Any) -> NoReturn:
        raise NotImplementedError("unused: see _download_and_prepare")

    def _generate_examples(self) -> NoReturn:
        raise NotImplementedError("unused: see _download_and_prepare")


def _link(file: Path, other: str | os.PathLike) -> None:
    try:
        os.link(file, other)
    except OSError:  # a file system without hard links
        shutil.copyfile(file, other)
