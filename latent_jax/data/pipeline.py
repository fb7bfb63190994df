"""Records to batches with Grain: shuffled, mixed, decoded by threads, packed, and resumable to the bit.

Grain owns the order, the decoding (a random-access dataset, so a position is one number) and the prefetching of whole
batches: its thread runs the packing, and every batch travels with the state that it leaves behind.
"""

import contextlib
import dataclasses
import functools
import traceback
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import grain
import numpy as np
from grain import experimental

from latent_jax.data.chat import Processor
from latent_jax.data.layout import Example, Layout
from latent_jax.data.packing import Batch, BatchShape, Packer, Size, size_of
from latent_jax.errors import UserError, one_line

LayoutFn = Callable[[dict, int], Layout]
_BROKEN_AFTER = 100  # records seen before a share of broken ones means anything


@runtime_checkable
class Source(Protocol):
    """Random access to records, safe to read from several threads."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict: ...


@dataclasses.dataclass(frozen=True)
class _Broken:
    """A record that could not be laid out, and why."""

    message: str


@dataclasses.dataclass(frozen=True)
class _Sample:
    """A record sized from its file headers, which is enough to pack it, and a function that decodes it.

    If decoding fails (UserError), its place in the batch stays empty: other hosts have already packed around it.
    `number` is its place in the global order.
    """

    sized: Example
    decode: Callable[[], Example]
    number: int


def make_dataset(
    source: Source | Sequence[tuple[Source, float]],
    *,
    layout_fn: LayoutFn,
    processor: Processor,
    batch_shape: BatchShape,
    seed: int = 0,
    shuffle: bool = True,
    epochs: int | None = None,
    own: Sequence[int] | None = None,
    threads: int = 4,
    prefetch: int = 2,
    max_broken: float = 0.05,
) -> "BatchIterator":
    """An iterator of batches over one source, or over several by weight ([(source, weight), ...]).

    `layout_fn(record, index)` gets the sample's place in the global order (over epochs and processes). `shuffle` draws
    a new order each epoch from `seed`; `epochs` None repeats for ever; a mixture ends with the first source that does.
    `batch_shape` is that of the whole step; `own` the groups of it that this host builds, None all. Every host walks
    the one global order, reading and tokenising each record, and decodes the images of its own groups alone: the
    batches of all hosts side by side are those of one, and so is the state between them. Batches depend on nothing
    else: not on `threads`, not on `prefetch`. Raises UserError where a source is empty.
    """
    samples = in_order(source, seed, shuffle, epochs)
    shared = own is not None and len(own) < batch_shape.groups
    examples = samples.map_with_index(functools.partial(_lay_out, layout_fn, processor, batch_shape, shared))
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4 * threads)
    return BatchIterator(
        lambda: iter(examples.to_iter_dataset(options)),
        functools.partial(Packer, batch_shape, own),
        threads if shared else 0,
        max_broken,
        prefetch,
    )


def in_order(
    source: Source | Sequence[tuple[Source, float]], seed: int = 0, shuffle: bool = True, epochs: int | None = None
) -> grain.MapDataset:
    """The records of one source or of a mixture in the one order that every run with this seed reads (make_dataset).

    Raises UserError where a source is empty.
    """
    sources = _weighted(source)
    if any(len(each) == 0 for each, _ in sources):
        raise UserError("a data source is empty")
    if any(weight <= 0 for _, weight in sources):
        raise UserError(f"weights of a mixture must be positive, got {[weight for _, weight in sources]}")
    if len(sources) == 1:
        return _ordered(sources[0][0], seed, shuffle, epochs)
    return grain.MapDataset.mix(
        # Each source its own order, also where two are equally long.
        [_ordered(each, seed + 7919 * i, shuffle, epochs) for i, (each, _) in enumerate(sources)],
        [weight for _, weight in sources],
    )


def _weighted(source: Any) -> list[tuple[Source, float]]:
    """The sources of a mixture and their weights. A list or tuple of records is one source."""
    mixture = isinstance(source, list | tuple) and source and isinstance(source[0], tuple)
    return list(source) if mixture else [(source, 1.0)]


def _ordered(source: Source, seed: int, shuffle: bool, epochs: int | None) -> grain.MapDataset:
    dataset = grain.MapDataset.source(source)
    if shuffle:
        dataset = dataset.shuffle(seed=seed % 2**32)
    return dataset if epochs == 1 else dataset.repeat(epochs)


def _lay_out(
    layout_fn: LayoutFn, processor: Processor, batch_shape: BatchShape, shared: bool, index: int, record: dict
) -> "_Sample | _Broken":
    """A sized record. Where one host has all groups it is decoded here, `shared` ones on the host of their group."""
    failed = None
    try:
        with naming(record):
            layout = layout_fn(record, int(index))
            if not shared:
                try:
                    with naming(record):
                        example = processor.lay_out(layout)
                        batch_shape.check(example)
                        return _Sample(example, lambda: example, int(index))
                except UserError as caught:
                    failed = caught
            sized = processor.lay_out(layout, decode=False)
            batch_shape.check(sized)
    except UserError as caught:
        return _Broken(str(failed or caught))
    return _Sample(sized, functools.partial(_decode, processor, layout, size_of(sized)), int(index))


def _decode(processor: Processor, layout: Layout, size: Size) -> Example:
    with naming({"key": layout.key}):
        example = processor.lay_out(layout)
        if size_of(example) != size:
            raise UserError(f"record {layout.key!r}: its images have another size than their headers say")
    return example


def usable(
    records: Iterable[dict], layout_fn: LayoutFn, processor: Processor, batch_shape: BatchShape
) -> Iterator[Example]:
    """The examples of all records that training does not skip. Raises the first record's UserError if none is left."""
    first, count = None, 0
    for index, record in enumerate(records):
        try:
            with naming(record):
                example = processor.lay_out(layout_fn(record, index))
                batch_shape.check(example)
        except UserError as problem:
            first = first or problem
            continue
        count += 1
        yield example
    if first and not count:
        raise UserError(f"no usable record: {first}")


@contextlib.contextmanager
def naming(record: Mapping) -> Iterator[None]:
    """Turns any exception over a record into a UserError with its key: libraries raise anything over odd files.

    Such records are skipped and counted. A fault of the method itself meets every record, so that the run ends with the
    exception's text and line.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as problem:
        key = record.get("key", "") if isinstance(record, Mapping) else ""
        place = traceback.extract_tb(problem.__traceback__)[-1]
        where = f"{Path(place.filename).name}:{place.lineno}"
        raise UserError(f"record {key!r}: {type(problem).__name__}: {one_line(problem)} ({where})") from problem


class BatchIterator:
    """Batches, made ahead by a background thread. `get_state` is that of the last batch handed out.

    A state is a small JSON-able dict. Setting it on an iterator made with the same arguments gives the batches that
    followed, bit for bit. `skipped` counts the broken records before the last batch handed out.

    In the state, `position`, `seen` and `skipped` are those of the global order, the same on every host. `blank` counts
    the records whose decoding failed, in this host's groups; the sum over hosts is the count of a single host.
    """

    def __init__(
        self,
        open_samples: Callable[[], grain.DatasetIterator],
        make_packer: Callable[[], Packer],
        decoders: int,
        max_broken: float,
        prefetch: int,
    ):
        self._open_samples = open_samples
        self._make_packer = make_packer
        self._decoders = decoders
        self._max_broken = max_broken
        self._prefetch = max(1, prefetch)
        self._state: dict[str, Any] = {"position": None, "seen": 0, "skipped": 0, "blank": 0, "broken": []}
        self._ahead: experimental.ThreadPrefetchDatasetIterator | None = None
        self._ended: Exception | None = None

    def __iter__(self) -> "BatchIterator":
        return self

    def __next__(self) -> Batch:
        if self._ended:  # Grain's iterator would go on behind what it raised
            raise self._ended
        if self._ahead is None:
            steps = _steps(self._open_samples(), self._state, self._make_packer(), self._decoders, self._max_broken)
            self._ahead = experimental.ThreadPrefetchDatasetIterator(_Stateful(steps, self._state), self._prefetch)
            self._stop = weakref.finalize(self, _stop, self._ahead, steps)
        try:
            batch = next(self._ahead)
        except Exception as problem:
            self._ended = problem
            raise
        self._state = self._ahead.get_state()
        return batch

    def get_state(self) -> dict[str, Any]:
        return {**self._state, "broken": list(self._state["broken"])}

    def set_state(self, state: dict[str, Any]) -> None:
        state = {"blank": 0, **state}
        if set(state) != set(self._state):
            raise UserError(f"data state has the keys {sorted(state)}, expected {sorted(self._state)}")
        self.close()
        self._state = {**state, "broken": list(state["broken"])}

    @property
    def skipped(self) -> int:
        return self._state["skipped"] + self._state["blank"]

    def close(self) -> None:
        """Ends the background thread; the next batch starts another where the last one stopped."""
        if self._ahead is not None:
            self._stop()
            self._ahead = self._ended = None


def _stop(ahead: experimental.ThreadPrefetchDatasetIterator, steps: Generator) -> None:
    """Returns once the threads have ended, so that two never read one source's state."""
    ahead.close()
    steps.close()


class _Stateful(Iterator[Batch]):
    """The batches of `_steps`; `get_state` is that of the last one. Grain's thread asks for both."""

    def __init__(self, steps: Generator[tuple[Batch, dict[str, Any]]], state: dict[str, Any]):
        self._steps, self._state = steps, state

    def __next__(self) -> Batch:
        try:
            batch, self._state = next(self._steps)
        except Exception:
            raise
        except BaseException as problem:  # such as a panic in the tokenizer; Grain's thread hands on Exceptions only
            raise RuntimeError(f"{type(problem).__name__}: {problem}") from problem
        return batch

    def get_state(self) -> dict[str, Any]:
        return self._state


def _steps(
    samples: grain.DatasetIterator, state: dict[str, Any], packer: Packer, decoders: int, max_broken: float
) -> Generator[tuple[Batch, dict[str, Any]]]:
    """(batch, state after it) for every step.

    A batch is finished by the first example of the next one. The state is therefore the position *before* that example:
    it is read again after a resume, and the packer's contents never need storing. `decoders` threads decode the records
    of this host's groups, each as soon as its place is known; with 0 they are decoded when the batch is built.
    """
    if state["position"] is not None:
        samples.set_state(state["position"])
    counts = {name: state[name] for name in ("seen", "skipped", "blank", "broken")}
    before = {**counts, "position": samples.get_state()}
    failures: list[str] = []  # of decoding; filled while a batch is built
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(futures.ThreadPoolExecutor(decoders)) if decoders else None
        sample: _Sample | _Broken
        for sample in samples:
            counts = {**counts, "seen": counts["seen"] + 1}
            if isinstance(sample, _Broken):
                counts = _counted(counts, "skipped", [sample.message], max_broken)
            else:
                decoding = _Decoding(sample.decode, failures)
                batch = packer.add(sample.sized, decoding, sample.number)
                if pool and packer.mine:
                    decoding.start(pool)
                if batch is not None:
                    counts = _counted(counts, "blank", failures, max_broken)
                    yield batch, {**before, **{name: counts[name] for name in ("blank", "broken")}}
                    failures.clear()
            before = {**counts, "position": samples.get_state()}
        if (batch := packer.flush()) is not None:
            yield batch, _counted(before, "blank", failures, max_broken)
        elif 0 < counts["skipped"] == counts["seen"]:
            raise UserError(f"no usable record: all {counts['seen']} are broken: {'; '.join(counts['broken'])}")


class _Decoding:
    """Decodes a placed example, in a thread after `start`, else when called. Returns None if that fails."""

    def __init__(self, decode: Callable[[], Example], failures: list[str]):
        self._decode, self._failures = decode, failures

    def start(self, pool: futures.Executor) -> None:
        self._decode = pool.submit(self._decode).result

    def __call__(self) -> Example | None:
        try:
            return self._decode()
        except UserError as problem:
            self._failures.append(str(problem))
            return None


def _counted(counts: dict[str, Any], kind: str, messages: list[str], max_broken: float) -> dict[str, Any]:
    first = list(dict.fromkeys([*counts["broken"], *messages]))[:3]  # a later epoch meets the same ones again
    counts = {**counts, kind: counts[kind] + len(messages), "broken": first}
    if messages:
        check_broken(counts, max_broken)
    return counts


def check_broken(state: dict[str, Any], max_broken: float) -> None:
    """Raises UserError where more than a share of `max_broken` of the records that a state has seen is broken."""
    seen, skipped = state["seen"], state["skipped"] + state["blank"]
    if seen >= _BROKEN_AFTER and skipped > max_broken * seen:
        examples = "; ".join(state["broken"])
        raise UserError(f"{skipped} of {seen} records are broken, more than {max_broken:.0%}: {examples}")


def sample_examples(source: Source, layout_fn: LayoutFn, processor: Processor, n: int = 256) -> list[Example]:
    """Examples from all over a source, in order, for batch_shapes.choose: their shapes, without their pixels.

    Broken records are left out; UserError naming the first of them where nothing is left.
    """
    count = min(n, len(source))
    first_broken = ""
    examples = []
    for index in range(count):
        record = source[index * len(source) // count]
        try:
            with naming(record):
                example = processor.lay_out(layout_fn(record, index))
        except UserError as problem:
            first_broken = first_broken or str(problem)
            continue
        given = example.target_latents
        hollow = dataclasses.replace(
            example,
            patches=np.broadcast_to(np.uint8(0), example.patches.shape),
            target_latents=None if given is None else np.broadcast_to(given.dtype.type(0), given.shape),
        )
        examples.append(hollow)
    if not examples:
        raise UserError(f"no usable record among {count}" + (f": {first_broken}" if first_broken else ""))
    return examples
