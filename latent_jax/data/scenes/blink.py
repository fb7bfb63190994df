"""The world as BLINK: SUB_TASK/val-00000-of-00001.parquet for four of its sub-tasks, with the official columns.

BLINK has no training split; ours stands in train-*.parquet. As published, the test answers are "hidden".
"""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from latent_jax.data.scenes import world
from latent_jax.data.scenes.captions import OPPOSITE, RELATION, name
from latent_jax.data.scenes.choices import options
from latent_jax.data.scenes.reflectance import draw
from latent_jax.data.scenes.render import BACKGROUND, TILE, encode, render, sprite

SUB_TASKS = ("Counting", "Jigsaw", "Relative_Reflectance", "Spatial_Relation")
MISSING = (0, 0, 0)
_OFFICIAL = {"train": "train", "validation": "val", "test": "test"}
_HALF = world.IMAGE_SIZE // 2
_ROWS = 100
_CELL = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_SCHEMA = pa.schema(
    [("idx", pa.string()), ("question", pa.string()), ("sub_task", pa.string())]
    + [(f"image_{i}", _CELL) for i in (1, 2, 3, 4)]
    + [("choices", pa.list_(pa.string())), ("answer", pa.string()), ("prompt", pa.string())]
)


_Question = tuple[list[Image.Image], str, list[str], int]  # images, question, choices, index of the right one


class _Placed(NamedTuple):
    """A thing of a jigsaw; x and y are its centre in pixels."""

    color: str
    shape: str
    size: str
    x: int
    y: int


def write(directory: Path, *, seed: int, sizes: Mapping[str, int]) -> None:
    """Writes `sizes` questions a split for each sub-task."""
    makers = dict(zip(SUB_TASKS, (_counting, _jigsaw, _reflectance, _relation), strict=True))
    for sub_task, make in makers.items():
        (directory / sub_task).mkdir(parents=True, exist_ok=True)
        for split, size in sizes.items():
            rows = []
            for number in range(size):
                rng = random.Random(f"{seed} {sub_task} {split} {number}")
                rows.append(_row(sub_task, split, number, *make(rng, split, number)))
            file = directory / sub_task / f"{_OFFICIAL[split]}-00000-of-00001.parquet"
            pq.write_table(pa.Table.from_pylist(rows, _SCHEMA), file, row_group_size=_ROWS)


def _row(
    sub_task: str, split: str, number: int, images: list[Image.Image], question: str, choices: list[str], answer: int
) -> dict[str, Any]:
    idx = f"{_OFFICIAL[split]}_{sub_task}_{number + 1}"
    cells = [{"bytes": encode(image), "path": f"{idx}_{i}.png"} for i, image in enumerate(images, 1)]
    listed = "\n".join(f"({letter}) {choice}" for letter, choice in zip("ABCD", choices, strict=False))
    return {
        "idx": idx,
        "question": question,
        "sub_task": sub_task,
        **dict(zip(("image_1", "image_2", "image_3", "image_4"), [*cells, *[None] * (4 - len(cells))], strict=True)),
        "choices": choices,
        "answer": "hidden" if split == "test" else f"({'ABCD'[answer]})",
        "prompt": f"{question}\nSelect one of the following choices.\n{listed}",
    }


def _counting(rng: random.Random, split: str, number: int) -> _Question:
    """Half of the questions name a colour, half a shape; 0 to 3 are equally often right."""
    wanted, place = number % 4, rng.randrange(4)
    while True:
        scene = world.sample(rng, split, placement="free", objects=(3, 6), striped=0.0)
        kinds = [(attribute, value) for attribute in ("color", "shape") for value in _VALUES[attribute]]
        fitting = [kind for kind in kinds if _count(scene, *kind) == wanted]
        if fitting:
            attribute, value = rng.choice(fitting)
            noun = f"{value} objects" if attribute == "color" else f"{value}s"
            choices = options(str(wanted), ["0", "1", "2", "3"], place, 4, rng)
            return [render(scene)], f"How many {noun} are there?", choices, place


_VALUES = {"color": world.COLORS, "shape": world.SHAPES}


def _count(scene: world.Scene, attribute: str, value: str) -> int:
    return sum(getattr(thing, attribute) == value for thing in scene.things)


def _relation(rng: random.Random, split: str, number: int) -> _Question:
    """Yes and no are equally often right; yes is always (A), so a letter means one thing."""
    true = number % 2 == 0
    choices = ["yes", "no"]
    while True:
        scene = world.sample(rng, split, placement="free", objects=(2, 5), striped=0.0)
        one, other = rng.sample(scene.things, 2)
        sides = [side for side in OPPOSITE if scene.is_side(side, one, other) == true]
        # A false side is the opposite of a true one: nothing is asked of things that are level.
        sides = sides if true else [side for side in sides if scene.is_side(OPPOSITE[side], one, other)]
        if sides:
            question = f"Is the {name(one)} {RELATION[rng.choice(sides)]} the {name(other)}?"
            return [render(scene)], question, choices, choices.index("yes" if true else "no")


def _jigsaw(rng: random.Random, split: str, number: int) -> _Question:
    """Two things lie across the seams; the wrong piece shows one of them in another colour, shape or place."""
    pool = world.allowed(split)
    used = rng.sample(pool, 6)
    down, across = _seams(rng)
    places = [(_HALF, down), (across, _HALF)]
    rest = [(28, 28), (28, 84), (84, 28)]
    things = [_Placed(*combination, "large", *place) for combination, place in zip(used, places)]
    things += [_Placed(*used[2 + i], rng.choice(world.SIZES), *p) for i, p in enumerate(rest) if rng.random() < 0.6]
    whole = _compose(things)
    wrong = _compose(_changed(things, pool, rng))
    corner = (_HALF, _HALF, 2 * _HALF, 2 * _HALF)
    first = whole.copy()
    first.paste(MISSING, corner)
    answer = number % 2
    pieces = [whole.crop(corner), wrong.crop(corner)]
    images = [first, *(pieces if answer == 0 else pieces[::-1])]
    question = (
        "The lower right corner of the first image is missing. Which image is the missing part, "
        "the second image or the third image?"
    )
    return images, question, ["the second image", "the third image"], answer


def _seams(rng: random.Random) -> tuple[int, int]:
    """Where on the two seams their things stand: not so near to the middle, both, that they meet."""
    while True:
        places = rng.randint(_HALF + 10, 98), rng.randint(_HALF + 10, 98)
        if max(places) >= _HALF + TILE:
            return places


def _changed(things: list[_Placed], pool: Sequence[world.Combination], rng: random.Random) -> list[_Placed]:
    """The things with one of the first two, which lie across the seams, changed so that its halves do not fit."""
    changed = list(things)
    which, kind = rng.randrange(2), rng.randrange(3)
    color, shape = things[which].color, things[which].shape
    if kind < 2:
        others = [c for c in pool if (c[0] == color) != (c[1] == shape) and (c[1] == shape) == (kind == 0)]
        color, shape = rng.choice(others)
        changed[which] = things[which]._replace(color=color, shape=shape)
        return changed
    here = things[0].y, things[1].x
    while True:  # drawn as the true places are: the piece alone must not tell
        which, there = rng.randrange(2), _seams(rng)
        if abs(there[which] - here[which]) >= 14 and max(there[which], here[1 - which]) >= _HALF + TILE:
            thing = things[which]
            changed[which] = thing._replace(x=there[1]) if which else thing._replace(y=there[0])
            return changed


def _compose(things: list[_Placed]) -> Image.Image:
    image = Image.new("RGB", (world.IMAGE_SIZE, world.IMAGE_SIZE), BACKGROUND)
    for color, shape, size, x, y in things:
        tile = sprite(shape, color, size, "plain")
        image.paste(tile, (x - TILE // 2, y - TILE // 2))
    return image


def _reflectance(rng: random.Random, split: str, number: int) -> _Question:
    answer = number % 3
    image, _ = draw(rng, ("A", "B", "same")[answer])
    question = "Which point is on the darker surface, A or B, or is the color of both about the same?"
    return [image], question, ["A is darker", "B is darker", "about the same"], answer
