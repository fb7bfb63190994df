"""Questions about a scene in GQA's form: nine tasks, each answered by one word, none answerable from its words alone.

A task looks at a scene and offers one draft for every answer that it can ask for here. `Asker` takes the draft whose
answer has been rarest so far for the same wording, and none at all where that would tip the balance.
"""

import collections
import itertools
import random
import typing
from collections.abc import Iterable, Iterator

from latent_jax.data.scenes.captions import OPPOSITE, RELATION, name
from latent_jax.data.scenes.world import COLORS, COLUMNS, ROWS, SHAPES, SIZES, Combination, Scene, Thing, allowed

TASKS = ("exist", "color", "shape", "size", "count", "same", "nearest", "where", "relation")
COUNTS = ("0", "1", "2", "3")
ANSWERS = ("yes", "no", *COLORS, *SHAPES, *SIZES, *COUNTS, *ROWS, *COLUMNS, "left", "right", "above", "below")
_SLACK = 3
_TOLERANCE = 1.15
_ENOUGH = 3
Pool = tuple[Combination, ...]
_T = typing.TypeVar("_T")


class Draft(typing.NamedTuple):
    """A question before it has an id. `things` are the indices (in the scene) of the things that it names."""

    task: str
    question: str
    answer: str
    full_answer: str
    choices: tuple[str, ...]
    structural: str
    semantic: str
    program: tuple[tuple[str, str], ...]
    things: tuple[int, ...]
    group: str | None = None


class Asker:
    """Writes the questions of one split's scenes, in order; remembers what it has answered so far."""

    def __init__(self, split: str):
        self._allowed = allowed(split)
        self._answered: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)

    def ask(self, scene: Scene, rng: random.Random) -> list[Draft]:
        """At most one question a task."""
        drafts = (self._choose(task(scene, rng, self._allowed), rng) for task in _TASKS)
        return [draft for draft in drafts if draft]

    def _choose(self, offered: Iterable[Draft], rng: random.Random) -> Draft | None:
        drafts = list(offered)
        rng.shuffle(drafts)
        if not drafts:
            return None
        draft = min(drafts, key=self._excess)
        counts = self._answers(draft)
        if counts[draft.answer] > _SLACK + _TOLERANCE * min(counts.values()):
            return None
        counts[draft.answer] += 1
        return draft

    def _excess(self, draft: Draft) -> int:
        counts = self._answers(draft)
        return counts[draft.answer] - min(counts.values())

    def _answers(self, draft: Draft) -> collections.Counter[str]:
        counts = self._answered[draft.question]
        if not counts:
            counts.update(dict.fromkeys(draft.choices, 0))
        return counts


def _exist(scene: Scene, rng: random.Random, pool: Pool) -> Iterator[Draft]:
    """Half of the absent ones have a colour and a shape that are both there, on different things."""
    present = {(thing.color, thing.shape): index for index, thing in enumerate(scene.things)}
    (color, shape), index = rng.choice(list(present.items()))
    yield _exists(color, shape, (index,))
    absent = [combination for combination in pool if combination not in present]
    crossed = [c for c in itertools.product(*map(dict.fromkeys, zip(*present, strict=True))) if c in absent]
    color, shape = rng.choice(crossed if crossed and rng.random() < 0.5 else absent)
    yield _exists(color, shape, ())


def _exists(color: str, shape: str, things: tuple[int, ...]) -> Draft:
    answer = "yes" if things else "no"
    full = f"Yes, there is a {color} {shape}." if things else f"No, there is no {color} {shape}."
    return Draft(
        "exist",
        f"Is there a {color} {shape}?",
        answer,
        full,
        ("yes", "no"),
        "verify",
        "obj",
        (("select", shape), ("filter color", color), ("exist", "?")),
        things,
    )


def _unique(scene: Scene, attribute: str) -> list[tuple[int, Thing]]:
    """(index, thing) of the things whose value of `attribute` no other thing has."""
    counts = collections.Counter(getattr(thing, attribute) for thing in scene.things)
    return [(i, thing) for i, thing in enumerate(scene.things) if counts[getattr(thing, attribute)] == 1]


def _color(scene: Scene, rng: random.Random, pool: Pool) -> Iterator[Draft]:
    for index, thing in _unique(scene, "shape"):
        possible = tuple(color for color in COLORS if (color, thing.shape) in pool)
        yield Draft(
            "color",
            f"What color is the {thing.shape}?",
            thing.color,
            f"The {thing.shape} is {thing.color}.",
            possible,
            "query",
            "attr",
            (("select", thing.shape), ("query", "color")),
            (index,),
            "color",
        )


def _shape(scene: Scene, rng: random.Random, pool: Pool) -> Iterator[Draft]:
    for index, thing in _unique(scene, "color"):
        possible = tuple(shape for shape in SHAPES if (thing.color, shape) in pool)
        yield Draft(
            "shape",
            f"What shape is the {thing.color} object?",
            thing.shape,
            f"The {thing.color} object is a {thing.shape}.",
            possible,
            "query",
            "cat",
            (("select", "object"), ("filter color", thing.color), ("query", "shape")),
            (index,),
            "shape",
        )


def _size(scene: Scene, rng: random.Random, pool: Pool) -> Iterator[Draft]:
    for index, thing in enumerate(scene.things):
        yield Draft(
            "size",
            f"Is the {name(thing)} large or small?",
            thing.size,
            f"The {name(thing)} is {thing.size}.",
            SIZES,
            "choose",
            "attr",
            (*_select(thing), ("choose size", "large|small")),
            (index,),
        )


def _number(scene: Scene, rng: random.Random, pool: Pool) -> Iterator[Draft]:
    kinds = [("shape", shape, f"{shape}s") for shape in SHAPES] + [
        ("color", color, f"{color} objects") for color in COLORS
    ]
    for attribute, value, noun in kinds:
        things = tuple(i for i, thing in enumerate(scene.things) if getattr(thing, attribute) == value)
        if len(things) >= len(COUNTS):
            continue
        select = (("select", value),) if attribute == "shape" else (("select", "object"), ("filter color", value))
        one = len(things) == 1
        full = f"There {'is' if one else 'are'} {len(things)} {noun[:-1] if one else noun}."
        yield Draft(
            "count",
            f"How many {noun} are there?",
            str(len(things)),
            full,
            COUNTS,
            "query",
            "obj",
            (*select, ("count", "?")),
            things,
            "count",
        )


def _same(scene: Scene, rng: random.Random, pool: Pool) -> Iterator[Draft]:
    """Colours are compared of things named by shape, shapes of things named by colour, sizes of any."""
    every = list(enumerate(scene.things))
    sides = (
        ("color", "{0.shape}", _unique(scene, "shape")),
        ("shape", "{0.color} object", _unique(scene, "color")),
        ("size", "{0.color} {0.shape}", every),
    )
    for attribute, pattern, things in sides:
        for (i, one), (j, other) in _some(rng, itertools.permutations(things, 2)):
            names = pattern.format(one), pattern.format(other)
            same = getattr(one, attribute) == getattr(other, attribute)
            full = f"{'Yes' if same else 'No'}, the {names[0]} and the {names[1]} are{'' if same else ' not'} the same "
            yield Draft(
                "same",
                f"Are the {names[0]} and the {names[1]} the same {attribute}?",
                "yes" if same else "no",
                f"{full}{attribute}.",
                ("yes", "no"),
                "compare",
                "attr",
                (("select", names[0]), ("select", names[1]), (f"same {attribute}", "?")),
                (i, j),
            )


def _nearest(scene: Scene, rng: random.Random, pool: Pool) -> Iterator[Draft]:
    """The nearest of the things on one side of another one, where no second thing is as near."""
    for (i, thing), side in _some(rng, itertools.product(enumerate(scene.things), OPPOSITE)):
        found = sorted(
            (_distance(scene, thing, other), j)
            for j, other in enumerate(scene.things)
            if scene.is_side(side, other, thing)
        )
        if not found or (len(found) > 1 and found[0][0] == found[1][0]):
            continue
        j = found[0][1]
        for attribute, choices in (("color", COLORS), ("shape", SHAPES)):
            value = getattr(scene.things[j], attribute)
            where = f"the nearest object {RELATION[side]} the {name(thing)}"
            full = f"{where.capitalize()} is {value if attribute == 'color' else f'a {value}'}."
            yield Draft(
                "nearest",
                f"What {attribute} is {where}?",
                value,
                full,
                choices,
                "query",
                "rel",
                (*_select(thing), (f"relate {side} nearest", "object"), ("query", attribute)),
                (i, j),
                attribute,
            )


def _distance(scene: Scene, thing: Thing, other: Thing) -> int:
    return sum((a - b) ** 2 for a, b in zip(scene.center(thing), scene.center(other), strict=True))


def _where(scene: Scene, rng: random.Random, pool: Pool) -> Iterator[Draft]:
    for i, thing in enumerate(scene.things):
        for line, value, choices in (("row", scene.row(thing), ROWS), ("column", scene.column(thing), COLUMNS)):
            yield Draft(
                "where",
                f"In which {line} is the {name(thing)}?",
                value,
                f"The {name(thing)} is in the {value} {line}.",
                choices,
                "query",
                "attr",
                (*_select(thing), ("query", line)),
                (i,),
                line,
            )


def _relation(scene: Scene, rng: random.Random, pool: Pool) -> Iterator[Draft]:
    """Which of two opposite sides, or whether it is one; nothing is asked of things that are level."""
    for (i, one), (j, other) in _some(rng, itertools.permutations(enumerate(scene.things), 2)):
        for side, back in (("left", "right"), ("above", "below")):
            if not (scene.is_side(side, one, other) or scene.is_side(back, one, other)):
                continue
            answer = side if scene.is_side(side, one, other) else back
            full = f"The {name(one)} is {RELATION[answer]} the {name(other)}."
            either = f"{side} or {RELATION[back]}"
            yield Draft(
                "relation",
                f"Is the {name(one)} {either} the {name(other)}?",
                answer,
                full,
                (side, back),
                "choose",
                "rel",
                (*_select(one), ("choose rel", f"{name(other)},{side}|{back}")),
                (i, j),
            )
            asked = rng.choice((side, back))
            yes = asked == answer
            full = f"{'Yes' if yes else 'No'}, the {name(one)} is {RELATION[answer]} the {name(other)}."
            yield Draft(
                "relation",
                f"Is the {name(one)} {RELATION[asked]} the {name(other)}?",
                "yes" if yes else "no",
                full,
                ("yes", "no"),
                "verify",
                "rel",
                (*_select(one), ("verify rel", f"{name(other)},{asked}")),
                (i, j),
            )


def _some(rng: random.Random, combinations: Iterable[_T]) -> list[_T]:
    """A few of many: enough to balance the answers, and the world is written several times faster."""
    every = list(combinations)
    return rng.sample(every, min(_ENOUGH, len(every)))


def _select(thing: Thing) -> tuple[tuple[str, str], tuple[str, str]]:
    return ("select", thing.shape), ("filter color", thing.color)


_TASKS = (_exist, _color, _shape, _size, _number, _same, _nearest, _where, _relation)
