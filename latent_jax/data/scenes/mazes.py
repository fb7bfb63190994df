"""Mazes as VSP: frozen lakes of 3 x 3 to 6 x 6 tiles, drawn, in Mirage's JSON Lines form with one shortest way.

SPLIT_direct.jsonl and imgs_SPLIT/levelN/img/ID.png; outside the test split with the answer and a helper image, the map
with the way drawn into it (imgs_SPLIT/levelN/way/ID.png).
"""

import json
import random
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from latent_jax.data.frozen_lake import MOVES, shortest
from latent_jax.data.scenes.render import encode
from latent_jax.data.scenes.world import CELL

LEVELS = (3, 4, 5, 6)
PROMPT = (
    "The map shows a frozen lake. Find a shortest way for the player to the goal that meets no hole. The moves are L "
    "(left), R (right), U (up) and D (down), one tile each.\n\nHere is the map: <image>\n\n"
    "Answer with the moves, such as R,R,D, in \\boxed{}."
)
_OFFICIAL = {"train": "train", "validation": "val", "test": "test"}
_BUCKETS = {"train": range(12), "validation": range(12, 14), "test": range(14, 16)}
_TILES = {"S": 1, "G": 2, "H": -1, "F": 0}
_ICE, _EDGE, _WATER, _RIM = (214, 234, 246), (160, 196, 220), (24, 60, 110), (90, 130, 170)
_COAT, _SKIN, _GOAL, _BAND, _WAY = (40, 140, 60), (236, 190, 150), (214, 40, 40), (240, 204, 30), (250, 120, 20)


def write(directory: Path, *, seed: int, sizes: Mapping[str, int]) -> None:
    """Writes `sizes` maps a split for each level. No map stands in two splits, none twice in one."""
    directory.mkdir(parents=True, exist_ok=True)
    for split, size in sizes.items():
        lines = []
        for level in LEVELS:
            rng = random.Random(f"{seed} vsp {split} {level}")
            seen: set[tuple[str, ...]] = set()
            for number in range(size):
                rows = _sample(rng, level, split, seen)
                seen.add(tuple(rows))
                lines.append(json.dumps(_line(directory, rows, split, level, number)))
        (directory / f"{_OFFICIAL[split]}_direct.jsonl").write_text("".join(f"{line}\n" for line in lines))


def _sample(rng: random.Random, level: int, split: str, seen: set[tuple[str, ...]]) -> list[str]:
    """A solvable map whose way takes at least two moves; the splits are told apart by the map itself."""
    while True:
        places = [(r, c) for r in range(level) for c in range(level)]
        start, goal, *others = rng.sample(places, len(places))
        holes = set(others[: round(rng.uniform(0.1, 0.4) * len(others))])
        rows = [
            "".join("S" if p == start else "G" if p == goal else "H" if p in holes else "F" for p in line)
            for line in ([(r, c) for c in range(level)] for r in range(level))
        ]
        if zlib.crc32("/".join(rows).encode()) % 16 not in _BUCKETS[split] or tuple(rows) in seen:
            continue
        if len(shortest(rows).split(",")) >= 2:
            return rows


def _line(directory: Path, rows: list[str], split: str, level: int, number: int) -> dict[str, Any]:
    """The official record of a map, whose pictures it writes."""
    folder = f"imgs_{_OFFICIAL[split]}/level{level}"
    for kind in ("img", "way"):
        (directory / folder / kind).mkdir(parents=True, exist_ok=True)
    name = f"{folder}/img/{number}.png"
    (directory / name).write_bytes(encode(draw(rows)))
    line = {
        "text_input": PROMPT,
        "image_input": f"./{name}",
        "map_id": str(number),
        "map_desc": [[_TILES[tile] for tile in row] for row in rows],
    }
    if split != "test":
        way = shortest(rows)
        helper = f"{folder}/way/{number}.png"
        (directory / helper).write_bytes(encode(draw(rows, way)))
        line |= {"text_output": f"\\boxed{{{way}}}", "image_output": f"./{helper}"}
    return line


def draw(rows: list[str], way: str = "") -> Image.Image:
    """RGB, 28 pixels a tile (one merged visual token of Qwen2.5-VL); `way` ("R,R,D") is drawn from the start on."""
    image = Image.new("RGB", (CELL * len(rows[0]), CELL * len(rows)), _ICE)
    pen = ImageDraw.Draw(image)
    for r, row in enumerate(rows):
        for c, tile in enumerate(row):
            x, y = c * CELL, r * CELL
            pen.rectangle([x, y, x + CELL - 1, y + CELL - 1], outline=_EDGE)
            if tile == "F":
                pen.line([(x + 7, y + 18), (x + 13, y + 12)], fill=_EDGE)
            {"H": _hole, "S": _player, "G": _present}.get(tile, lambda *place: None)(pen, x, y)
    if way:
        pen.line(_middles(rows, way), fill=_WAY, width=4)
    return image


def _middles(rows: list[str], way: str) -> list[tuple[int, int]]:
    """Middles in pixels (x, y) of the tiles that `way` passes. Raises ValueError where the map has no start."""
    r, c = divmod("".join(rows).index("S"), len(rows[0]))
    points = [(c * CELL + CELL // 2, r * CELL + CELL // 2)]
    for move in way.split(","):
        down, right = MOVES[move]
        points.append((points[-1][0] + CELL * right, points[-1][1] + CELL * down))
    return points


def _hole(pen: ImageDraw.ImageDraw, x: int, y: int) -> None:
    pen.ellipse([x + 3, y + 4, x + 24, y + 23], fill=_RIM)
    pen.ellipse([x + 5, y + 7, x + 22, y + 21], fill=_WATER)


def _player(pen: ImageDraw.ImageDraw, x: int, y: int) -> None:
    pen.polygon([(x + 14, y + 9), (x + 22, y + 25), (x + 6, y + 25)], fill=_COAT)
    pen.ellipse([x + 9, y + 3, x + 18, y + 12], fill=_SKIN)


def _present(pen: ImageDraw.ImageDraw, x: int, y: int) -> None:
    pen.rectangle([x + 5, y + 8, x + 22, y + 24], fill=_GOAL)
    pen.rectangle([x + 12, y + 8, x + 15, y + 24], fill=_BAND)
    pen.rectangle([x + 5, y + 14, x + 22, y + 17], fill=_BAND)
