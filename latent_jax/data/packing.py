"""Examples of any length into batches of static shape: first fit over groups and rows, in data order."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

import ml_dtypes  # noqa: F401 (NumPy then knows "bfloat16")
import numpy as np

from latent_jax.data.images import widen
from latent_jax.data.layout import Example, Room
from latent_jax.errors import UserError

Batch = dict[str, np.ndarray]
Decode = Callable[[], Example | None]


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """Static shape of a batch: A micro-steps of G groups of B rows of T tokens, P patches, E examples of S slots, J
    targets and Q reads.

    `channels` is c, the values of a patch; `image_patches` the most patches of one temporal slice (0: as `patches`);
    `merge_unit` the patches under one merged token, so that a group has M = patches // merge_unit of those.
    `target_slots`, `target_size` and `target_dtype` are shape and dtype of the latents that examples bring along (from
    a latent cache), of all J targets; 0: they bring none, targets are computed from images.
    """

    micro: int
    groups: int
    rows: int
    tokens: int
    patches: int
    examples: int
    slots: int
    channels: int
    image_patches: int = 0
    merge_unit: int = 4
    target_slots: int = 0
    target_size: int = 0
    target_dtype: str = "float32"
    targets: int = 0
    reads: int = 0
    regress: bool = False
    hidden: bool = False

    def __post_init__(self) -> None:
        if min(self.micro, self.groups, self.rows, self.tokens, self.examples, self.channels, self.merge_unit) < 1:
            raise UserError(f"{self}: every budget but patches and slots must be at least 1")
        if self.patches % self.merge_unit:
            raise UserError(f"{self}: patches must be a multiple of merge_unit {self.merge_unit}")

    def with_room(self, room: Room) -> "BatchShape":
        return dataclasses.replace(self, **dataclasses.asdict(room))

    def check(self, example: Example) -> "Size":
        """The example's size; UserError naming its key, length and the budget where it cannot fit even alone."""
        size = size_of(example)
        limits = {
            "tokens": (size.tokens, self.tokens),
            "patches": (size.patches, self.patches),
            "slots": (size.slots, self.slots),
            "targets": (size.targets, self.targets),
            "reads": (size.reads, self.reads),
            "patches in one image": (size.image_patches, self.image_patches or self.patches),
        }
        for what, (have, budget) in limits.items():
            if have > budget:
                raise UserError(f"record {example.key!r}: {have} {what}, more than the budget of {budget}")
        if size.patches and self.channels % size.channels:
            raise UserError(
                f"record {example.key!r}: patches of {size.channels} values, but batches hold "
                f"{self.channels} (video in a batch of stills)"
            )
        self._check_method(example, size)
        return size

    def _check_method(self, example: Example, size: "Size") -> None:
        """Raises ValueError if the method made no room for what its layout asks: no record is to blame."""
        if count := given_features(example, self.merge_unit):
            raise ValueError(f"record {example.key!r}: {count} given features, which only prompts have")
        for name in ("regress", "hidden"):
            if getattr(size, name) > getattr(self, name):
                raise ValueError(f"record {example.key!r}: needs Room({name}=True), which the method has not")
        given = example.target_latents
        if given is not None and not self._holds(given):
            raise ValueError(f"record {example.key!r}: latents {given.dtype.name} {given.shape}, batches hold {self}")
        if given is None and self.target_slots and len(example.target_image):
            raise UserError(f"record {example.key!r}: its image has no latents in the latent cache")

    def _holds(self, given: np.ndarray) -> bool:
        """Whether an example may bring these latents: of one to J targets."""
        if not self.target_slots or (given.shape[1:], given.dtype.name) != ((self.target_size,), self.target_dtype):
            return False
        each = self.target_slots // max(1, self.targets)
        return 0 < len(given) <= self.target_slots and len(given) % each == 0


@dataclasses.dataclass(frozen=True)
class Size:
    """What of an example counts against batch_shape."""

    tokens: int
    patches: int
    slots: int
    channels: int
    image_patches: int
    targets: int = 0
    reads: int = 0
    regress: bool = False
    hidden: bool = False

    @property
    def room(self) -> Room:
        return Room(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Room)})


def size_of(example: Example) -> Size:
    return Size(
        tokens=len(example.tokens),
        patches=len(example.patches),
        slots=len(example.slots),
        channels=example.patches.shape[1],
        image_patches=int(np.bincount(example.patch_image).max(initial=0)),
        targets=len(example.target_image),
        reads=len(example.reads),
        regress=example.feature_weights is not None,
        hidden=example.hidden is not None,
    )


def given_features(example: Example, merge_unit: int = 4) -> int:
    """How many features an example takes from outside (given Slots)."""
    first = len(example.patches) // merge_unit + len(example.slots)
    return max(0, int(example.feature_index.max(initial=-1)) + 1 - first)


class Packer:
    """Examples in, batches out. The first example that fits nowhere opens the next step; nothing is dropped.

    With `own`, ascending groups of a micro-step, every example is placed but only those groups are built: the part of
    one host of several.
    """

    def __init__(self, batch_shape: BatchShape, own: Sequence[int] | None = None):
        self.batch_shape = batch_shape
        groups = range(batch_shape.groups) if own is None else own
        # Flat place of a group in the whole step -> its flat place in the built arrays.
        whole = [micro * batch_shape.groups + group for micro in range(batch_shape.micro) for group in groups]
        self._built = {group: at for at, group in enumerate(whole)}
        self._kept = dataclasses.replace(batch_shape, groups=len(groups))
        self._count = 0
        self._open()

    def _open(self) -> None:
        self._fit = FirstFit(self.batch_shape)
        self._empty_step = True
        self._placed: list[tuple[Decode, int, int, int]] = []

    def add(self, example: Example, decode: Decode | None = None, number: int | None = None) -> Batch | None:
        """Takes an example; returns the finished batch where it had to open the next step.

        `decode()` returns the example to write when the batch is built (of the same size), or None to leave the place
        empty. It is called only for groups that this host builds; `mine` is whether the last example's is one of them.
        `number` goes to batch["number"]; None: how many examples this packer took before it.
        Raises UserError (and takes nothing) where the example alone exceeds a limit of the batch shape.
        """
        size = self.batch_shape.check(example)
        place = self._fit.place(size)
        finished = None
        if place is None:
            finished = self.flush()
            place = self._fit.place(size)
        if place is None:
            raise ValueError(f"{size} does not fit {self.batch_shape}")
        group, row = place
        self.mine = group in self._built
        if self.mine:
            number = self._count if number is None else number
            self._placed.append((decode or (lambda: example), self._built[group], row, number))
        self._count += 1
        self._empty_step = False
        return finished

    def flush(self) -> Batch | None:
        """The batch under way, padded; None where it is empty."""
        if self._empty_step:
            return None
        batch = _build(self._placed, self._kept)
        self._open()
        return batch


class FirstFit:
    """Room left in every group (flat over A and G) and row of one step."""

    def __init__(self, batch_shape: BatchShape):
        bins = batch_shape.micro * batch_shape.groups
        self.patches = [batch_shape.patches] * bins
        self.examples = [batch_shape.examples] * bins
        self.tokens = [[batch_shape.tokens] * batch_shape.rows for _ in range(bins)]

    def place(self, size: Size) -> tuple[int, int] | None:
        """(group, row) of the first fit, whose room it takes; None where nothing fits."""
        for group, rows in enumerate(self.tokens):
            if self.examples[group] and self.patches[group] >= size.patches:
                for row, room in enumerate(rows):
                    if room >= size.tokens:
                        rows[row] -= size.tokens
                        self.patches[group] -= size.patches
                        self.examples[group] -= 1
                        return group, row
        return None


def first_fit(lengths: Iterable[int], tokens: int) -> list[tuple[int, int]]:
    """(row, first token) of each length in turn, in as many rows of `tokens` as it takes: the first that has room."""
    room: list[int] = []
    places = []
    for length in lengths:
        row = next((row for row, left in enumerate(room) if left >= length), len(room))
        room += [tokens] if row == len(room) else []
        places.append((row, tokens - room[row]))
        room[row] -= length
    return places


def _build(placed: Sequence[tuple[Decode, int, int, int]], batch_shape: BatchShape) -> Batch:
    """The arrays of one step."""
    lead = batch_shape.micro * batch_shape.groups
    batch = empty(lead, batch_shape)
    writers = [Writer({name: array[group] for name, array in batch.items()}, batch_shape) for group in range(lead)]
    for decode, group, row, number in placed:
        if (example := decode()) is not None:
            writers[group].write(example, row, number=number)
    return {
        name: array.reshape(batch_shape.micro, batch_shape.groups, *array.shape[1:]) for name, array in batch.items()
    }


def shapes(batch_shape: BatchShape) -> dict[str, tuple[tuple[int, ...], type | np.dtype]]:
    """Every array of a batch: its shape behind (A, G), and its dtype. What there is no room for is left out."""
    B, T, P, E = batch_shape.rows, batch_shape.tokens, batch_shape.patches, batch_shape.examples
    S, J, Q = batch_shape.slots, batch_shape.targets, batch_shape.reads
    arrays: dict[str, tuple[tuple[int, ...], type | np.dtype]] = {
        **dict.fromkeys(("tokens", "segment_ids", "view_ids", "targets", "feature_index"), ((B, T), np.int32)),
        "positions": ((B, 3, T), np.int32),
        "loss_weights": ((B, T), np.float32),
        "patches": ((P, batch_shape.channels), np.uint8),
        "patch_positions": ((P, 2), np.int32),
        **dict.fromkeys(("patch_window", "patch_image"), ((P,), np.int32)),
        "example_mask": ((E,), bool),
        "number": ((E,), np.int32),
    }
    if S:
        arrays |= {"slot_index": ((E, S), np.int32), "slot_mask": ((E, S), bool)}
    if J:
        arrays |= {"target_image": ((E, J), np.int32), "target_grid": ((E, J, 2), np.int32)}
        arrays |= {"target_mask": ((E, J), bool)}
    if Q:
        arrays |= {"read_index": ((E, Q), np.int32), "read_mask": ((E, Q), bool)}
    if batch_shape.target_slots:
        shape = (E, batch_shape.target_slots, batch_shape.target_size)
        arrays["target_latents"] = (shape, np.dtype(batch_shape.target_dtype))
    if batch_shape.regress:
        arrays["feature_weights"] = ((B, T), np.float32)
    if batch_shape.hidden:
        arrays |= dict.fromkeys(("hidden", "late"), ((B, T), bool))
    return arrays


def empty(lead: int, batch_shape: BatchShape) -> Batch:
    """The arrays of `lead` groups without an example."""
    batch = {name: np.zeros((lead, *shape), dtype) for name, (shape, dtype) in shapes(batch_shape).items()}
    batch["feature_index"].fill(-1)
    return batch


class Writer:
    """Writes examples into the arrays of one group, each behind the last."""

    def __init__(self, group: Batch, batch_shape: BatchShape):
        self.group, self.batch_shape = group, batch_shape
        self.examples = 0
        self._tokens = [0] * batch_shape.rows
        self._patches = self._windows = self._images = self._given = 0

    def write(self, example: Example, row: int, first: int | None = None, number: int = 0) -> None:
        """One example into a row, from token `first` on; None: behind the row's last one."""
        first = self._tokens[row] if first is None else first
        given = given_features(example, self.batch_shape.merge_unit)
        self._write_tokens(example, row, slice(first, first + len(example.tokens)), given)
        self._write_patches(example)
        self._write_example(example, row * self.batch_shape.tokens + first, number)
        self._tokens[row] = max(self._tokens[row], first + len(example.tokens))
        self._patches += len(example.patches)
        self._windows += int(example.patch_window.max(initial=0))
        self._images += int(example.patch_image.max(initial=0))
        self._given += given
        self.examples += 1

    def _write_tokens(self, example: Example, row: int, span: slice, given: int) -> None:
        group = self.group
        for name in ("tokens", "view_ids", "targets", "loss_weights"):
            group[name][row, span] = getattr(example, name)
        for name in ("feature_weights", "hidden", "late"):
            if (asked := getattr(example, name)) is not None:
                group[name][row, span] = asked
        group["segment_ids"][row, span] = self.examples + 1
        group["positions"][row, :, span] = example.positions
        group["feature_index"][row, span] = self._in_group(example, given)

    def _in_group(self, example: Example, given: int) -> np.ndarray:
        """Its feature indices in the group: visual tokens follow the neighbours'; learned slot s is M + s for every
        example; given features follow the neighbours' from M + S on."""
        batch_shape, index = self.batch_shape, example.feature_index
        m, M = len(example.patches) // batch_shape.merge_unit, batch_shape.patches // batch_shape.merge_unit
        S = len(example.slots)
        found = np.where(index < 0, -1, index + self._patches // batch_shape.merge_unit)
        if S or given:
            slot = index - m + M
            outside = slot - S + batch_shape.slots + self._given
            found = np.where(index < m, found, np.where(index < m + S, slot, outside))
        return found

    def _write_patches(self, example: Example) -> None:
        if not len(example.patches):
            return
        group, here = self.group, slice(self._patches, self._patches + len(example.patches))
        group["patches"][here] = widen(example.patches, self.batch_shape.channels)
        group["patch_positions"][here] = example.patch_positions
        group["patch_window"][here] = example.patch_window + self._windows
        group["patch_image"][here] = example.patch_image + self._images

    def _write_example(self, example: Example, flat: int, number: int) -> None:
        """The arrays of one entry an example, axis E; `flat` is the place row * T + t of its first token."""
        group, place = self.group, self.examples
        group["example_mask"][place] = True
        group["number"][place] = number % 2**31
        for name, tokens in (("slot", example.slots), ("read", example.reads)):
            if count := len(tokens):
                group[f"{name}_index"][place, :count] = tokens + flat
                group[f"{name}_mask"][place, :count] = True
        if count := len(example.target_image):
            group["target_image"][place, :count] = example.target_image + self._images
            group["target_grid"][place, :count] = example.target_grid
            group["target_mask"][place, :count] = True
        if (latents := example.target_latents) is not None:  # of some of the targets that there is room for
            count = self.batch_shape.targets * len(latents) // self.batch_shape.target_slots
            group["target_latents"][place, : len(latents)] = latents
            group["target_mask"][place, :count] = True


def batches(examples: Iterable[Example], batch_shape: BatchShape) -> Iterator[Batch]:
    """Every example exactly once, in order, the last batch padded; batch["number"] counts them."""
    packer = Packer(batch_shape)
    for example in examples:
        if (batch := packer.add(example)) is not None:
            yield batch
    if (batch := packer.flush()) is not None:
        yield batch
