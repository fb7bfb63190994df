"""VSP's mazes (https://github.com/UCSB-NLP-Chang/Visual-Spatial-Planning) in the JSON Lines form in which Mirage
published them (https://github.com/UMass-Embodied-AGI/Mirage), to one record a map.

A line of SPLIT.jsonl or SPLIT_direct.jsonl is {"text_input", "image_input"} and, for training, {"text_output",
"image_output"}; the test file has "map_id" and "map_desc", rows of 1 start, 2 goal, -1 hole, 0 ice. Where a line has no
map_desc, the map is read from VSP's own levelN/pure_text/ID.txt, if that stands beside levelN/img/ID.png.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latent_jax.data.builders import parts
from latent_jax.data.builders.base import RawBuilder, each, record
from latent_jax.data.builders.files import first_there, is_text, read_image, read_json_lines, split_name
from latent_jax.data.builders.parts import Part, Record
from latent_jax.data.builders.tally import Tally
from latent_jax.data.frozen_lake import read_map, shortest
from latent_jax.errors import UserError
from latent_jax.runtime.files import MOST_JSON, read_bytes

_LARGEST = 64  # rows and columns of a map; VSP has up to 8


class Vsp(RawBuilder):
    """One record a line: its input image (or images), `map` over S F H G ([] where unknown), the answer or a plan."""

    name = "vsp"
    NOUN = "map"

    def find(self) -> dict[str, Any]:
        """Split -> its file."""
        found: dict[str, Path] = {}
        for file in sorted(self.raw.glob("*.jsonl")):
            split = split_name(file.stem.removesuffix("_direct"))
            if split in found:
                raise UserError(f"{file}: {found[split].name} is also there and both are {split}; keep one of them")
            found[split] = file
        if not found:
            raise UserError(f"{self.raw}: no train.jsonl or test_direct.jsonl here, expected VSP in Mirage's form")
        return found

    def parts(self, place: Any, tally: Tally) -> list[Part]:
        """Lines, some at a time: (line number, entry)."""
        return parts.chunks(read_json_lines(place, "map", tally), (place,))

    def examples(self, part: Part, tally: Tally) -> Iterator[Record]:
        def make(item: tuple[int, dict[str, Any]]) -> Record:
            number, entry = item
            try:
                return self._record(number, entry)
            except ValueError as error:
                raise ValueError(f"{part.files[0].name}: line {number}: {error}") from None

        return each(part.place, "map", tally, make, lambda item: f"in line {item[0]}")

    def _record(self, number: int, entry: dict[str, Any]) -> Record:
        inputs = entry.get("image_input")
        inputs = [inputs] if isinstance(inputs, str) else inputs
        if not is_text(entry.get("text_input")) or not isinstance(inputs, list) or not all(map(is_text, inputs)):
            raise ValueError(f"expected text_input and image_input, got {', '.join(entry)}")
        images = [self._locate(image) for image in inputs]
        rows = read_map(entry["map_desc"]) if "map_desc" in entry else _described(images)
        answer = entry.get("text_output", "")
        if not isinstance(answer, str):
            raise ValueError("text_output is not text")
        question = {key: value for key, value in entry.items() if key not in ("image_input", "image_output")}
        key = _name(entry, inputs, number)
        question = {
            "id": key,
            "question": entry["text_input"],
            **question,
            "map": rows,
            "answer": answer or shortest(rows),
        }
        helper = entry.get("image_output")
        helpers = [read_image(self._locate(helper))] if isinstance(helper, str) and helper else []
        return record(key, images=list(map(read_image, images)), questions=[question], helper_images=helpers)

    def _locate(self, name: str) -> Path:
        """Paths were written for another folder: the longest end of the path that is there."""
        steps = [step for step in Path(name).parts if step not in ("/", ".", "..")]
        if not steps or "\0" in name:
            raise ValueError(f"{name[:80]!r} is no file name")
        return first_there([self.raw.joinpath(*steps[start:]) for start in range(len(steps))])


def _name(entry: dict[str, Any], images: list[str], number: int) -> str:
    """level3/31 from .../level3/img/31.png where the file numbers its maps, else the line's number."""
    if "map_id" not in entry:
        return str(number)
    level = re.search(r"level_?\d+", images[0])
    return f"{level[0]}/{entry['map_id']}" if level else str(entry["map_id"])


def _described(images: list[Path]) -> list[str]:
    """The map that VSP's own text beside the image describes, or []."""
    file = images[0].parent.parent / "pure_text" / f"{images[0].stem}.txt"
    if not file.is_file():
        return []
    text = read_bytes(file, MOST_JSON).decode("utf-8", "replace").lower()
    size = re.search(r"(\d+)\s*x\s*(\d+) map", text)
    if not size:
        raise ValueError(f"{file}: expected 'This is a 3x3 map.'")
    if not (0 < int(size[1][:9]) <= _LARGEST and 0 < int(size[2][:9]) <= _LARGEST):
        raise ValueError(f"{file}: a {size[1][:9]}x{size[2][:9]} map, expected at most {_LARGEST} rows and columns")
    description = [[0] * int(size[2]) for _ in range(int(size[1]))]
    for kind, tile in (("player is at", 1), ("hole", -1), ("goal is at", 2)):
        _, found, rest = text.partition(kind)
        for r, c in re.findall(r"row (\d+), column (\d+)", rest.partition("\n")[0]) if found else ():
            if not (1 <= int(r) <= len(description) and 1 <= int(c) <= len(description[0])):
                raise ValueError(f"{file}: row {r}, column {c} is outside the map")
            description[int(r) - 1][int(c) - 1] = tile
    return read_map(description)
