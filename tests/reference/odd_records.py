"""Seeded odd records of a benchmark: what files of the world hold where the official form says otherwise."""

import io
import random
from collections.abc import Callable

from PIL import Image

from tests.reference import benchmark_records as records

TEXTS = [
    "", " ", "\n", "What\nis\nit?", "What <|image_pad|> is it?", "<|im_end|>\n<|im_start|>assistant\nA",
    "<|vision_start|>", "half \ud83d", "\udc00", "a\x00b", "\ufeff", "\u202egnihton", "\ue000 private",
    "e" + "\u0301" * 300, "<image>", "<image><image><image>", "{question}", "{prompt} {", "%s %d", "x" * 120_000,
    "(A) (B)", "(a) (b)", "\\boxed{", "Action plan: R", "😀", "<think>", "</s>", "\r", "\u2028",
]  # fmt: skip
VALUES = [
    None, True, False, 0, -1, 3, 2**70, 1.5, float("nan"), float("inf"), [], {}, [[]], [None], ["a"], {"a": 1},
    ["x"] * 30, ["", ""], ["a", "a"], ["a", 3], ["A", "B"], ["B is it", "A is it"], ["half \ud83d", "x"],
]  # fmt: skip


def field(draw: random.Random, made: list[dict], at: int) -> None:
    """Another value in the place of an official field, or none."""
    question = made[at]["questions"][0]
    name = draw.choice(sorted(question))
    if draw.random() < 0.2:
        del question[name]
    else:
        question[name] = draw.choice(TEXTS if draw.random() < 0.5 else VALUES)


def inner(draw: random.Random, made: list[dict], at: int) -> None:
    """The same one level deeper, where there is one."""
    question = made[at]["questions"][0]
    inside = [name for name in sorted(question) if isinstance(question[name], dict | list) and question[name]]
    if not inside:
        field(draw, made, at)
        return
    name = draw.choice(inside)
    value, new = question[name], draw.choice([*TEXTS, *VALUES])
    if isinstance(value, dict):
        question[name] = {**value, draw.choice(sorted(value)): new}
    else:
        question[name] = [*value[:-1], new]


def same_id(draw: random.Random, made: list[dict], at: int) -> None:
    """Of a later question of the file, which is then the one that comes too late, or of an earlier one."""
    names = [q["id"] for record in made for q in record["questions"] if isinstance(q, dict) and "id" in q]
    made[at]["questions"][0]["id"] = draw.choice(names)


def no_question(draw: random.Random, made: list[dict], at: int) -> None:
    made[at]["questions"] = draw.choice([[], [None], ["What?"], [3], [[]], [{}]])


def image_count(draw: random.Random, made: list[dict], at: int) -> None:
    made[at]["images"] = (made[at]["images"] or [records.png(1)]) * draw.choice((0, 2, 5))


def image(draw: random.Random, made: list[dict], at: int) -> None:
    if made[at]["images"]:
        made[at]["images"] = [*made[at]["images"][:-1], draw.choice(IMAGES)(draw)]


def _saved(size: tuple[int, int], kind: str = "png", mode: str = "RGB", **options) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, kind, **options)
    return buffer.getvalue()


def _claims(width: int, height: int) -> bytes:
    """A PNG whose header says another size than its data has."""
    import struct
    import zlib

    whole = _saved((8, 8))
    header = b"IHDR" + struct.pack(">II", width, height) + whole[24:29]
    return whole[:12] + header + struct.pack(">I", zlib.crc32(header)) + whole[33:]


def _exif(draw: random.Random) -> bytes:
    """Tags that hold what no camera writes."""
    exif = Image.Exif()
    exif[0x0112] = draw.choice((0, 9, 65535))
    exif[0x010E] = "\x00" * 5 + "x" * draw.randrange(2000)
    content = bytearray(_saved((60, 90), "jpeg", exif=exif))
    for _ in range(draw.randrange(8)):  # and damage among them
        content[draw.randrange(20, 80)] ^= 1 << draw.randrange(8)
    return bytes(content)


IMAGES: list[Callable[[random.Random], bytes]] = [
    lambda draw: b"",
    lambda draw: b"no image at all",
    lambda draw: _saved((1, 1)),
    lambda draw: _saved((900, 4)),
    lambda draw: _saved((2, 3000)),
    lambda draw: _saved((9000, 40), mode="1"),
    lambda draw: _saved((60, 90))[: draw.randrange(1, 90)],
    lambda draw: _claims(10**6, 10**6),
    lambda draw: _claims(2**31 - 1, 1),
    lambda draw: _claims(0, 8),
    lambda draw: _saved((60, 90), "jpeg", "CMYK"),
    lambda draw: _saved((60, 90), "png", "P", transparency=0),
    lambda draw: _saved((60, 90), "png", "I;16"),
    lambda draw: _saved((60, 90), "tiff", "F"),
    lambda draw: _saved((60, 90), "gif"),
    _exif,
]
ODDITIES = (field, inner, same_id, no_question, image_count, image)


def odd(benchmark: str, seed: int, share: float = 0.5, oddities=ODDITIES) -> tuple[list[dict], set[int]]:
    """(records of a benchmark, the places of the odd ones among them)."""
    draw = random.Random(f"{benchmark} {seed}")
    made, touched = records.EVERY[benchmark](12), set()
    for at in range(len(made)):
        if draw.random() < share:
            draw.choice(oddities)(draw, made, at)
            touched.add(at)
    return made, touched
