"""The world of `scenes`: what there is, where it may stand, and which scene belongs to which split.

A scene is a few things on a plain floor of 112 x 112 pixels. No two things of a scene share colour *and* shape, so "the
red ball" always names one thing. Placement `grid` puts every thing in the middle of a 28-pixel cell, which is one
merged visual token of Qwen2.5-VL (patch 14, merge 2). Placement `free` uses a 10 x 10 lattice that knows nothing of
the cells.
"""

import dataclasses
import random
import zlib
from collections.abc import Sequence

IMAGE_SIZE = 112
CELL = 28
LATTICE = 10

SHAPES = ("ball", "cube", "cone", "star")
COLORS = ("red", "green", "blue", "yellow", "purple", "cyan")
SIZES = ("large", "small")
MATERIALS = ("plain", "striped")
ROWS = ("top", "upper", "lower", "bottom")
COLUMNS = ("leftmost", "left", "right", "rightmost")
PLACEMENTS = ("grid", "free")
SPLITS = ("train", "validation", "test", "compositional")

Combination = tuple[str, str]  # colour, shape
COMBINATIONS = tuple((color, shape) for color in COLORS for shape in SHAPES)
HELD_OUT = frozenset({("purple", "ball"), ("green", "cube"), ("blue", "cone"), ("red", "star")})

# Splits are disjoint by what a scene holds, not by its index: any seed, any sizes, never a test scene in training.
_BUCKETS = {"train": range(12), "validation": range(12, 14), "test": range(14, 16)}
_FREE_GAP = 3
_CENTERS = {
    "grid": range(CELL // 2, IMAGE_SIZE, CELL),
    "free": [CELL // 2 + round((IMAGE_SIZE - CELL) * place / (LATTICE - 1)) for place in range(LATTICE)],
}


@dataclasses.dataclass(frozen=True, slots=True)
class Thing:
    """One object; x and y are its place (column, row) on the grid (0..3) or on the free lattice (0..9)."""

    shape: str
    color: str
    size: str
    material: str
    x: int
    y: int


@dataclasses.dataclass(frozen=True, slots=True)
class Scene:
    """Things in reading order (row, then column)."""

    things: tuple[Thing, ...]
    placement: str

    def center(self, thing: Thing) -> tuple[int, int]:
        """Centre of a thing in pixels (x, y)."""
        centers = _CENTERS[self.placement]
        return centers[thing.x], centers[thing.y]

    def row(self, thing: Thing) -> str:
        return ROWS[self.center(thing)[1] // CELL]

    def column(self, thing: Thing) -> str:
        return COLUMNS[self.center(thing)[0] // CELL]

    def is_side(self, direction: str, thing: Thing, other: Thing) -> bool:
        """Whether `thing` is left / right / above / below `other`, by more than half a cell."""
        axis = 0 if direction in ("left", "right") else 1
        gap = self.center(other)[axis] - self.center(thing)[axis]
        return (gap if direction in ("left", "above") else -gap) > CELL // 2


def allowed(split: str) -> tuple[Combination, ...]:
    """(colour, shape) combinations that a split may show or mention."""
    return COMBINATIONS if split == "compositional" else tuple(c for c in COMBINATIONS if c not in HELD_OUT)


def sample(rng: random.Random, split: str, *, placement: str, objects: tuple[int, int], striped: float) -> Scene:
    """Draws a scene of `split`: with least and most `objects`, of which the share `striped` is striped."""
    while True:
        count = rng.randint(*objects)
        combinations = _combinations(rng, allowed(split), count)
        if split == "compositional" and HELD_OUT.isdisjoint(combinations):
            continue
        places = _places(rng, count, placement)
        things = [
            Thing(shape, color, rng.choice(SIZES), MATERIALS[rng.random() < striped], x, y)
            for (color, shape), (x, y) in zip(combinations, places, strict=True)
        ]
        scene = Scene(tuple(sorted(things, key=lambda thing: (thing.y, thing.x))), placement)
        if split == "compositional" or zlib.crc32(repr(scene).encode()) % 16 in _BUCKETS[split]:
            return scene


def _combinations(rng: random.Random, pool: Sequence[Combination], count: int) -> list[Combination]:
    """Distinct combinations; every other scene has a theme (a shared colour or shape), or counts above one are rare."""
    theme = rng.random()
    chosen: list[Combination] = []
    if theme < 0.5:
        part = 0 if theme < 0.25 else 1
        value = rng.choice((COLORS, SHAPES)[part])
        family = [combination for combination in pool if combination[part] == value]
        chosen = rng.sample(family, min(len(family), rng.randint(2, count)))
    rest = [combination for combination in pool if combination not in chosen]
    chosen += rng.sample(rest, count - len(chosen))
    rng.shuffle(chosen)
    return chosen


def _places(rng: random.Random, count: int, placement: str) -> list[tuple[int, int]]:
    if placement == "grid":
        side = IMAGE_SIZE // CELL
        return [divmod(cell, side)[::-1] for cell in rng.sample(range(side * side), count)]
    places: list[tuple[int, int]] = []
    while len(places) < count:
        x, y = rng.randrange(LATTICE), rng.randrange(LATTICE)
        if all(max(abs(x - a), abs(y - b)) >= _FREE_GAP for a, b in places):
            places.append((x, y))
        elif rng.random() < 0.01:
            places.clear()  # a layout in which the next thing finds no room: start over
    return places
