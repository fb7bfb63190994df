"""The world as ScienceQA: problems.json, pid_splits.json and SPLIT/PID/image.png.

Four kinds of problem in turn: about an image; about an image, with a hint; about a scene that only the hint describes;
and about words alone. Questions of shapes and colours count as natural science, of places as social science, of words
as language science, so that every line of the official report has its share.
"""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latent_jax.data.scenes import world
from latent_jax.data.scenes.captions import full
from latent_jax.data.scenes.choices import options
from latent_jax.data.scenes.questions import Asker
from latent_jax.data.scenes.render import encode, render

_OFFICIAL = {"train": "train", "validation": "val", "test": "test"}
_MOST = 1_000_000
_SOCIAL = ("where", "relation", "nearest")
_TOPICS = {"natural science": "physics", "social science": "geography", "language science": "vocabulary"}
_WORDS = {
    "color": world.COLORS,
    "shape": world.SHAPES,
    "size": world.SIZES,
    "place": (*world.ROWS, *world.COLUMNS),
}
_LECTURE = "A scene is a square of four rows and four columns. Every thing in it has a shape, a color and a size."


def write(directory: Path, *, seed: int, sizes: Mapping[str, int]) -> None:
    """Writes `sizes` problems a split."""
    directory.mkdir(parents=True, exist_ok=True)
    problems: dict[str, dict[str, Any]] = {}
    pids: dict[str, list[str]] = {}
    for split, size in sizes.items():
        asker = Asker(split)
        pids[_OFFICIAL[split]] = []
        for number in range(size):
            pid = str(world.SPLITS.index(split) * _MOST + number + 1)
            rng = random.Random(f"{seed} scienceqa {split} {number}")
            problem, image = _problem(rng, split, number, asker)
            problems[pid] = problem
            pids[_OFFICIAL[split]].append(pid)
            if image:
                file = directory / _OFFICIAL[split] / pid / "image.png"
                file.parent.mkdir(parents=True)
                file.write_bytes(image)
    (directory / "problems.json").write_text(json.dumps(problems))
    (directory / "pid_splits.json").write_text(json.dumps(pids))


def _problem(rng: random.Random, split: str, number: int, asker: Asker) -> tuple[dict[str, Any], bytes | None]:
    """(official record, PNG bytes or None)."""
    kind = number % 4
    if kind == 3:
        return _record(split, rng, *_vocabulary(rng, number // 4)), None
    while True:
        scene = world.sample(rng, split, placement="grid", objects=(2, 4), striped=0.0)
        if drafts := asker.ask(scene, rng):  # none where every question would tip the balance of the answers
            break
    draft = rng.choice(drafts)
    choices = options(draft.answer, draft.choices, rng.randrange(4), 4, rng)
    subject = "social science" if draft.task in _SOCIAL else "natural science"
    hint = {0: "", 1: "The picture shows a scene of four rows and four columns.", 2: f"A scene: {full(scene)}"}[kind]
    text = (draft.question, choices, choices.index(draft.answer), hint, subject, draft.task, draft.full_answer)
    return _record(split, rng, *text, image=kind != 2), encode(render(scene)) if kind != 2 else None


def _vocabulary(rng: random.Random, number: int) -> tuple[str, list[str], int, str, str, str, str]:
    """Which of the words names a color? One does, the others name something else."""
    wanted = list(_WORDS)[number % len(_WORDS)]
    answer = rng.choice(_WORDS[wanted])
    others = [word for kind, words in _WORDS.items() if kind != wanted for word in words]
    choices = options(answer, others, rng.randrange(4), 4, rng)
    solution = f"The word {answer} names a {wanted}."
    question = f"Which word names a {wanted}?"
    return question, choices, choices.index(answer), "", "language science", wanted, solution


def _record(
    split: str,
    rng: random.Random,
    question: str,
    choices: list[str],
    answer: int,
    hint: str,
    subject: str,
    skill: str,
    solution: str,
    image: bool = False,
) -> dict[str, Any]:
    return {
        "question": question,
        "choices": choices,
        "answer": answer,
        "hint": hint,
        "image": "image.png" if image else None,
        "task": "closed choice",
        "grade": f"grade{rng.randint(1, 12)}",
        "subject": subject,
        "topic": _TOPICS[subject],
        "category": "Words" if subject == "language science" else "Scenes",
        "skill": f"Tell the {skill}",
        "lecture": "" if subject == "language science" else _LECTURE,
        "solution": solution,
        "split": _OFFICIAL[split],
    }
