"""Examples of any length into batches of static shape: first fit over groups and rows, in data order."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

import ml_dtypes  # noqa: F401 (NumPy then knows "bfloat16")
import numpy as np

from latent_jax.data.images import widen
from latent_jax.data.layout import Example
from latent_jax.errors import UserError

Batch = dict[str, np.ndarray]
Drawn = Callable[[], Example | None]


@dataclasses.dataclass(frozen=True)
class Budgets:
    """Static shape of a batch: A micro-steps of G groups of B rows of T tokens, P patches, E examples of S slots.

    `channels` is c, the values of a patch; `image_patches` the most patches of one temporal slice (0: as `patches`);
    `merge_unit` the patches under one merged token, so that a group has M = patches // merge_unit of those.
    `target_slots`, `target_size` and `target_dtype` are shape and dtype of the latents that examples bring along (from
    a latent cache); 0: they bring none, targets are computed from images.
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

    def __post_init__(self):
        if min(self.micro, self.groups, self.rows, self.tokens, self.examples, self.channels, self.merge_unit) < 1:
            raise UserError(f"{self}: every budget but patches and slots must be at least 1")
        if self.patches % self.merge_unit:
            raise UserError(f"{self}: patches must be a multiple of merge_unit {self.merge_unit}")

    def check(self, example: Example) -> "Size":
        """The example's size; UserError naming its key, length and the budget where it cannot fit even alone."""
        size = size_of(example, self.merge_unit)
        limits = {
            "tokens": (size.tokens, self.tokens),
            "patches": (size.patches, self.patches),
            "slots": (size.slots, self.slots),
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
        self._check_target(example)
        return size

    def _check_target(self, example: Example) -> None:
        given, wanted = example.target_latents, (self.target_slots, self.target_size)
        if given is not None and (given.shape, given.dtype.name) != (wanted, self.target_dtype):
            raise ValueError(f"record {example.key!r}: latents {given.dtype.name} {given.shape}, batches hold {self}")
        if given is None and self.target_slots and example.target_image:
            raise UserError(f"record {example.key!r}: its image has no latents in the latent cache")


@dataclasses.dataclass(frozen=True)
class Size:
    """What of an example counts against budgets. `slots` also counts given features (Imagined)."""

    tokens: int
    patches: int
    slots: int
    channels: int
    image_patches: int


def size_of(example: Example, merge_unit: int = 4) -> Size:
    given = int(example.feature_index.max(initial=-1)) + 1 - len(example.patches) // merge_unit
    return Size(
        tokens=len(example.tokens),
        patches=len(example.patches),
        slots=max(given, 0),
        channels=example.patches.shape[1],
        image_patches=int(np.bincount(example.patch_image).max(initial=0)),
    )


class Packer:
    """Examples in, batches out. The first example that fits nowhere opens the next step; nothing is dropped.

    With `own`, ascending groups of a micro-step, every example is placed but only those groups are built: what one host
    of several holds. `numbers` then counts over all examples and has those groups only.
    """

    def __init__(self, budgets: Budgets, own: Sequence[int] | None = None):
        self.budgets = budgets
        groups = range(budgets.groups) if own is None else own
        # Flat place of a group in the whole step -> its flat place in what is built.
        whole = [micro * budgets.groups + group for micro in range(budgets.micro) for group in groups]
        self._built = {group: at for at, group in enumerate(whole)}
        self._kept = dataclasses.replace(budgets, groups=len(groups))
        self.numbers = np.zeros((0,), np.int64)  # (A, G, E) of the last batch: which example (counted from 0), -1 none
        self._count = 0
        self._open()

    def _open(self) -> None:
        self._fit = FirstFit(self.budgets)
        self._empty_step = True
        self._placed: list[tuple[Drawn, int, int, int]] = []

    def add(self, example: Example, drawn: Drawn | None = None) -> Batch | None:
        """Takes an example; returns the finished batch where it had to open the next step.

        `drawn` gives, when the batch is built, what is written in the example's place (of the same size), or None: the
        place stays empty. It is asked only where the place is in a group that is built; `mine` says so.
        Raises UserError (and takes nothing) where the example alone exceeds a budget.
        """
        size = self.budgets.check(example)
        place = self._fit.place(size)
        finished = None
        if place is None:
            finished = self.flush()
            place = self._fit.place(size)
        group, row = place
        self.mine = group in self._built
        if self.mine:
            self._placed.append((drawn or (lambda: example), self._built[group], row, self._count))
        self._count += 1
        self._empty_step = False
        return finished

    def flush(self) -> Batch | None:
        """The batch under way, padded; None where it is empty."""
        if self._empty_step:
            return None
        batch, self.numbers = _build(self._placed, self._kept)
        self._open()
        return batch


class FirstFit:
    """Room left in every group (flat over A and G) and row of one step."""

    def __init__(self, budgets: Budgets):
        bins = budgets.micro * budgets.groups
        self.patches = [budgets.patches] * bins
        self.examples = [budgets.examples] * bins
        self.tokens = [[budgets.tokens] * budgets.rows for _ in range(bins)]

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


def _build(placed: Sequence[tuple[Drawn, int, int, int]], budgets: Budgets) -> tuple[Batch, np.ndarray]:
    """The arrays of one step, and which example stands in which slot."""
    lead = budgets.micro * budgets.groups
    batch = _empty(lead, budgets)
    numbers = np.full((lead, budgets.examples), -1, np.int64)
    cursors = [_Cursor(budgets.rows) for _ in range(lead)]
    for drawn, group, row, number in placed:
        if (example := drawn()) is None:
            continue
        cursor = cursors[group]
        numbers[group, cursor.examples] = number
        _write({name: array[group] for name, array in batch.items()}, example, row, cursor, budgets)
    shape = (budgets.micro, budgets.groups)
    return {name: array.reshape(*shape, *array.shape[1:]) for name, array in batch.items()}, numbers.reshape(*shape, -1)


@dataclasses.dataclass
class _Cursor:
    """How much of a group is written."""

    rows: int
    patches: int = 0
    windows: int = 0
    images: int = 0
    examples: int = 0

    def __post_init__(self):
        self.tokens = [0] * self.rows
        self.segments = [0] * self.rows


def shapes(budgets: Budgets) -> dict[str, tuple[tuple[int, ...], type]]:
    """Every array of a batch: its shape behind (A, G), and its dtype."""
    B, T, P, E, S = budgets.rows, budgets.tokens, budgets.patches, budgets.examples, budgets.slots
    sizes = {
        **dict.fromkeys(("tokens", "segment_ids", "view_ids", "targets", "feature_index"), (B, T)),
        "positions": (B, 3, T),
        "loss_weights": (B, T),
        "patches": (P, budgets.channels),
        "patch_positions": (P, 2),
        **dict.fromkeys(("patch_window", "patch_image"), (P,)),
        **dict.fromkeys(("example_mask", "latent_mask", "target_image", "example_segment", "example_row"), (E,)),
        "latent_index": (E, S),
        **dict.fromkeys(("target_grid", "caption_span"), (E, 2)),
    }
    if budgets.target_slots:
        sizes["target_latents"] = (E, budgets.target_slots, budgets.target_size)
    types = {"loss_weights": np.float32, "patches": np.uint8, "example_mask": bool, "latent_mask": bool}
    types["target_latents"] = np.dtype(budgets.target_dtype)
    return {name: (shape, types.get(name, np.int32)) for name, shape in sizes.items()}


def _empty(lead: int, budgets: Budgets) -> Batch:
    batch = {name: np.zeros((lead, *shape), dtype) for name, (shape, dtype) in shapes(budgets).items()}
    batch["feature_index"].fill(-1)
    return batch


def _write(group: Batch, example: Example, row: int, cursor: _Cursor, budgets: Budgets) -> None:
    """One example into its group's arrays; `cursor` moves on."""
    first, patch, slot = cursor.tokens[row], cursor.patches, cursor.examples
    t, p = len(example.tokens), len(example.patches)
    cursor.segments[row] += 1
    span = slice(first, first + t)
    for name in ("tokens", "view_ids", "targets", "loss_weights"):
        group[name][row, span] = getattr(example, name)
    group["segment_ids"][row, span] = cursor.segments[row]
    group["positions"][row, :, span] = example.positions
    group["feature_index"][row, span] = _in_group(example.feature_index, p // budgets.merge_unit, patch, budgets)

    here = slice(patch, patch + p)
    if p:
        group["patches"][here] = widen(example.patches, budgets.channels)
        group["patch_positions"][here] = example.patch_positions
        group["patch_window"][here] = example.patch_window + cursor.windows
        group["patch_image"][here] = example.patch_image + cursor.images

    flat = row * budgets.tokens + first
    group["example_mask"][slot] = True
    group["latent_mask"][slot] = example.target_image > 0 or example.target_latents is not None
    if example.target_latents is not None:
        group["target_latents"][slot] = example.target_latents
    group["latent_index"][slot, : len(example.slots)] = example.slots + flat
    group["target_image"][slot] = example.target_image + cursor.images if example.target_image else 0
    group["target_grid"][slot] = example.target_grid
    group["caption_span"][slot] = example.caption_span + flat
    group["example_segment"][slot] = cursor.segments[row]
    group["example_row"][slot] = row

    cursor.tokens[row] += t
    cursor.patches += p
    cursor.windows += int(example.patch_window.max(initial=0))
    cursor.images += int(example.patch_image.max(initial=0))
    cursor.examples += 1


def _in_group(index: np.ndarray, merged: int, first_patch: int, budgets: Budgets) -> np.ndarray:
    """An example's feature indices as its group's: visual tokens behind its neighbours', slots behind all M."""
    visual = index + first_patch // budgets.merge_unit
    given = index - merged + budgets.patches // budgets.merge_unit
    return np.where(index < 0, -1, np.where(index < merged, visual, given))


def numbered_batches(examples: Iterable[Example], budgets: Budgets) -> Iterator[tuple[Batch, np.ndarray]]:
    """Every example exactly once, in order, the last batch padded; with each batch, (A, G, E) example numbers or -1."""
    packer = Packer(budgets)
    for example in examples:
        if (batch := packer.add(example)) is not None:
            yield batch, packer.numbers
    if (batch := packer.flush()) is not None:
        yield batch, packer.numbers
