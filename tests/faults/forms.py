"""One small raw folder of each official form that `prepare` reads."""

import json
from pathlib import Path

from latent_jax.data import scenes
from latent_jax.data.scenes import benchmarks
from tests.data.builders import official

COUNT = 8


def write(name: str, root: Path) -> None:
    """Writes the official files of dataset `name` to `root`."""
    {
        "coco_captions": coco_captions,
        "conceptual_captions": shards,
        "laion": shards,
        "gqa": gqa,
        "scienceqa": lambda root: made("scienceqa", root),
        "blink": lambda root: made("blink", root),
        "vsp": lambda root: made("vsp", root),
        "vstar": vstar,
        "mmvp": mmvp,
    }[name](root)


def coco_captions(root: Path) -> None:
    official.coco_folder(root, COUNT)
    official.coco_folder(root, COUNT, "val2017")


def shards(root: Path) -> None:
    for number in range(2):
        official.write_tar(root / f"{number:05}.tar", official.samples(COUNT * number, COUNT))


def gqa(root: Path) -> None:
    whole = root.with_name(f"{root.name}.scenes")
    scenes.write(whole, sizes={"train": COUNT, "validation": 4})
    (whole / "gqa").rename(root)


def made(name: str, root: Path) -> None:
    sizes = {
        "scienceqa": {"train": COUNT, "validation": 2, "test": 4},
        "blink": {"validation": 2, "test": 2},
        "vsp": {"test": 2},
    }
    benchmarks.write(name, root, seed=0, sizes=sizes[name])


def vstar(root: Path) -> None:
    lines = []
    for i in range(COUNT):
        category, options = (("direct_attributes", "red blue green white"), ("relative_position", "left right"))[i % 2]
        options = options.split()
        file = root / category / f"sa_{i}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(official.picture(i))
        annotation = {"target_object": [f"thing {i}"], "bbox": [[i, 2, 3, 4]], "question": "What?", "options": options}
        file.with_suffix(".json").write_text(json.dumps(annotation))
        listed = "\n".join(f"({letter}) {option}" for letter, option in zip("ABCD", options, strict=False))
        text = f"What?\n{listed}\nAnswer with the option's letter from the given choices directly."
        name = f"{category}/{file.name}"
        lines.append({"image": name, "text": text, "category": category, "label": "A", "question_id": i})
    (root / "test_questions.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def mmvp(root: Path) -> None:
    (root / "MMVP Images").mkdir(parents=True)
    rows = ["Index,Question,Options,Correct Answer\n"]
    for i in range(1, COUNT + 1):
        (root / "MMVP Images" / f"{i}.jpg").write_bytes(official.picture(i))
        rows.append(f'{i},"Are they open, or closed, in {i}?",(a) Open (b) Closed again,({"ba"[i % 2]})\n')
    (root / "Questions.csv").write_text("".join(rows))
