"""Writes the world in the official on-disk forms of COCO captions and of GQA."""

import functools
import json
import os
import random
from collections.abc import Callable, Mapping
from pathlib import Path

from latent_jax.data.scenes import official
from latent_jax.data.scenes.captions import captions
from latent_jax.data.scenes.questions import Asker
from latent_jax.data.scenes.render import encode, render
from latent_jax.data.scenes.world import PLACEMENTS, SPLITS, Scene, sample
from latent_jax.errors import UserError

VERSION = "1.2.0"
SIZES = {"train": 6000, "validation": 500, "test": 250, "compositional": 250}
_MOST = 1_000_000


def write(
    directory: str | os.PathLike,
    *,
    seed: int = 0,
    sizes: Mapping[str, int] = SIZES,
    placement: str = "grid",
    objects: tuple[int, int] = (2, 4),
    striped: float = 0.0,
) -> None:
    """Writes `directory`/coco and `directory`/gqa; the same arguments give the same bytes.

    coco/annotations/captions_SPLIT.json with coco/SPLIT/000000000001.png, and
    gqa/questions/SPLIT_balanced_questions.json, gqa/sceneGraphs/SPLIT_sceneGraphs.json with gqa/images/1.png (hard
    links), and but for train gqa/eval/SPLIT_choices.json, the answers that make sense. A COCO image id is
    int(GQA imageId).
    A split's scenes do not depend on the other splits' sizes. `objects`: least and most things of a scene;
    `striped`: share of things that are striped (0 leaves materials out of the world).

    Raises UserError for arguments out of range.
    """
    _check(sizes, placement, objects, striped)
    directory = Path(directory)
    for folder in ("coco/annotations", "gqa/questions", "gqa/sceneGraphs", "gqa/images", "gqa/eval"):
        (directory / folder).mkdir(parents=True, exist_ok=True)
    for split, size in sizes.items():
        draw = functools.partial(sample, split=split, placement=placement, objects=objects, striped=striped)
        _write_split(directory, split, size, seed, draw)


def _check(sizes: Mapping[str, int], placement: str, objects: tuple[int, int], striped: float) -> None:
    for split, size in sizes.items():
        if split not in SPLITS:
            raise UserError(f"scenes: no split {split!r}, expected one of {', '.join(SPLITS)}")
        if not 1 <= size < _MOST:
            raise UserError(f"scenes: {split} of {size} scenes, expected 1 to {_MOST - 1}")
    if placement not in PLACEMENTS:
        raise UserError(f"scenes: placement {placement!r}, expected one of {', '.join(PLACEMENTS)}")
    if not 2 <= objects[0] <= objects[1] <= 6:
        raise UserError(f"scenes: objects {objects}, expected least and most between 2 and 6")
    if not 0 <= striped <= 1:
        raise UserError(f"scenes: striped {striped}, expected a share from 0 to 1")


def _write_split(directory: Path, split: str, size: int, seed: int, draw: Callable[[random.Random], Scene]) -> None:
    (directory / "coco" / split).mkdir(exist_ok=True)
    asker = Asker(split)
    # JSON texts: as objects they would burden the collector.
    images: list[str] = []
    annotations: list[str] = []
    questions: list[str] = []
    graphs: list[str] = []
    choices: list[str] = []
    for number in range(size):
        image_id = SPLITS.index(split) * _MOST + number + 1
        rng = random.Random(f"{seed} {split} {number}")
        scene = draw(rng)
        file = directory / "coco" / split / f"{image_id:012}.png"
        file.write_bytes(encode(render(scene)))
        _link(file, directory / "gqa" / "images" / f"{image_id}.png")
        images.append(json.dumps(official.coco_image(image_id, file.name)))
        annotations += map(json.dumps, official.coco_annotations(image_id, captions(scene, rng)))
        drafts = asker.ask(scene, rng)
        for (question_id, question), draft in zip(official.gqa_questions(image_id, drafts).items(), drafts):
            questions.append(f'"{question_id}": {json.dumps(question)}')
            choices.append(f'"{question_id}": {json.dumps(official.gqa_choices(draft))}')
        graphs.append(f'"{image_id}": {json.dumps(official.gqa_scene_graph(image_id, scene))}')
    info = json.dumps({"description": f"scenes {split}, seed {seed}", "version": VERSION})
    coco = f'"info": {info}, "licenses": [], "images": [{", ".join(images)}], "annotations": [{", ".join(annotations)}]'
    (directory / "coco" / "annotations" / f"captions_{split}.json").write_text(f"{{{coco}}}")
    (directory / "gqa" / "questions" / f"{split}_balanced_questions.json").write_text(f"{{{', '.join(questions)}}}")
    if split != "train":
        (directory / "gqa" / "eval" / f"{split}_choices.json").write_text(f"{{{', '.join(choices)}}}")
    (directory / "gqa" / "sceneGraphs" / f"{split}_sceneGraphs.json").write_text(f"{{{', '.join(graphs)}}}")


def _link(file: Path, other: Path) -> None:
    try:
        os.link(file, other)
    except OSError:  # a file system without hard links
        other.write_bytes(file.read_bytes())
