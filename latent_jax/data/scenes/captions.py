"""Captions of a scene. The first is always the full one, from which the image could be drawn again."""

import random

from latent_jax.data.scenes.world import Scene, Thing

OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
RELATION = {"left": "left of", "right": "right of", "above": "above", "below": "below"}


def captions(scene: Scene, rng: random.Random) -> list[str]:
    """[full, some things, some places, a chain of relations]."""
    return [full(scene), _things(scene, rng), _places(scene, rng), _chain(scene, rng)]


def full(scene: Scene) -> str:
    """Every thing in reading order with everything that can be seen of it: "large red ball top left, ..."."""
    return ", ".join(f"{thing.size} {_look(thing)} {_place(scene, thing)}" for thing in scene.things) + "."


def name(thing: Thing) -> str:
    """The shortest name that is unique in any scene."""
    return f"{thing.color} {thing.shape}"


def _look(thing: Thing) -> str:
    return name(thing) if thing.material == "plain" else f"{thing.material} {name(thing)}"


def _place(scene: Scene, thing: Thing) -> str:
    if scene.placement == "grid":
        return f"{scene.row(thing)} {scene.column(thing)}"
    return f"x{thing.x} y{thing.y}"


def _things(scene: Scene, rng: random.Random) -> str:
    """One to three of the things, by a name that leaves something out."""
    chosen = rng.sample(scene.things, rng.randint(1, min(3, len(scene.things))))
    return (
        " and ".join(
            rng.choice(
                (f"a {name(thing)}", f"a {thing.shape}", f"a {thing.color} object", f"a {thing.size} {thing.shape}")
            )
            for thing in chosen
        )
        + "."
    )


def _places(scene: Scene, rng: random.Random) -> str:
    """One or two of the things and where they are."""
    chosen = rng.sample(scene.things, rng.randint(1, 2))
    return ", ".join(f"a {name(thing)} at {scene.row(thing)} {scene.column(thing)}" for thing in chosen) + "."


def _chain(scene: Scene, rng: random.Random) -> str:
    """ "a red ball left of a blue cube above a green star": each thing related to the next."""
    things = rng.sample(scene.things, len(scene.things))
    text = f"a {_look(things[0])}"
    for thing, following in zip(things, things[1:], strict=False):
        sides = [side for side in OPPOSITE if scene.is_side(side, thing, following)]
        text += f" {RELATION[rng.choice(sides)]} a {_look(following)}"
    return text + "."
