"""Draws scenes. Every sprite is drawn once at 8 x its size and reduced (anti-aliasing), then pasted."""

import functools
import math
import struct
import zlib
from collections.abc import Callable

from PIL import Image, ImageDraw

from latent_jax.data.scenes.world import CELL, IMAGE_SIZE, Scene, Thing

BACKGROUND = (224, 224, 220)
RGB = {
    "red": (214, 40, 40),
    "green": (38, 150, 60),
    "blue": (40, 72, 214),
    "yellow": (240, 204, 30),
    "purple": (142, 44, 170),
    "cyan": (44, 198, 210),
}
RADIUS = {"large": 12, "small": 7}
TILE = CELL - 2  # things of the free placement stand 28 pixels apart: their tiles never touch
_SCALE = 8
_Color = tuple[int, ...]
_Points = list[tuple[float, float]]
_ToPixels = Callable[[_Points], _Points]  # from a sprite of radius 1 around (0, 0)


def render(scene: Scene) -> Image.Image:
    """The scene as a 112 x 112 RGB image; a function of the scene alone."""
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), BACKGROUND)
    for thing in scene.things:
        x, y = scene.center(thing)
        image.paste(sprite(thing.shape, thing.color, thing.size, thing.material), (x - TILE // 2, y - TILE // 2))
    return image


def encode(image: Image.Image) -> bytes:
    """PNG bytes. Unfiltered rows suit flat areas, and PIL's writer, which tries them all, takes thrice as long."""
    data, stride = image.tobytes(), 3 * image.width
    rows = b"".join(b"\0" + data[start : start + stride] for start in range(0, len(data), stride))
    header = struct.pack(">IIBBBBB", image.width, image.height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 1)), (b"IEND", b""))
    packed = (
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def box(scene: Scene, thing: Thing) -> tuple[int, int, int, int]:
    """x, y (top left corner), width and height in pixels."""
    (x, y), radius = scene.center(thing), RADIUS[thing.size]
    return x - radius, y - radius, 2 * radius, 2 * radius


@functools.cache
def sprite(shape: str, color: str, size: str, material: str) -> Image.Image:
    canvas = Image.new("RGB", (TILE * _SCALE, TILE * _SCALE), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    middle, radius = TILE * _SCALE / 2, RADIUS[size] * _SCALE
    base = RGB[color]

    def points(pairs: _Points) -> _Points:
        return [(middle + radius * x, middle + radius * y) for x, y in pairs]

    {"ball": _ball, "cube": _cube, "cone": _cone, "star": _star}[shape](draw, points, base)
    if material == "striped":
        canvas = _stripe(canvas, radius)
    return canvas.reduce(_SCALE)


def _shade(base: _Color, amount: float) -> _Color:
    """Towards white (amount > 0) or black (amount < 0)."""
    end = 255 if amount > 0 else 0
    return tuple(round(value + (end - value) * abs(amount)) for value in base)


def _ball(draw: ImageDraw.ImageDraw, points: _ToPixels, base: _Color) -> None:
    draw.ellipse([*points([(-1, -1), (1, 1)])], fill=_shade(base, -0.25))
    draw.ellipse([*points([(-0.92, -0.94), (0.8, 0.78)])], fill=base)
    draw.ellipse([*points([(-0.55, -0.6), (-0.1, -0.15)])], fill=_shade(base, 0.6))


def _cube(draw: ImageDraw.ImageDraw, points: _ToPixels, base: _Color) -> None:
    draw.polygon(points([(-0.92, -0.5), (0.5, -0.5), (0.5, 0.92), (-0.92, 0.92)]), fill=base)
    draw.polygon(points([(-0.92, -0.5), (-0.5, -0.92), (0.92, -0.92), (0.5, -0.5)]), fill=_shade(base, 0.45))
    draw.polygon(points([(0.5, -0.5), (0.92, -0.92), (0.92, 0.5), (0.5, 0.92)]), fill=_shade(base, -0.4))


def _cone(draw: ImageDraw.ImageDraw, points: _ToPixels, base: _Color) -> None:
    draw.ellipse([*points([(-0.95, 0.45), (0.95, 1)])], fill=_shade(base, -0.3))
    draw.polygon(points([(0, -1), (0.95, 0.72), (-0.95, 0.72)]), fill=base)
    draw.polygon(points([(0, -1), (0.95, 0.72), (0.3, 0.9)]), fill=_shade(base, -0.3))


def _star(draw: ImageDraw.ImageDraw, points: _ToPixels, base: _Color) -> None:
    corners = []
    for corner in range(10):
        reach = 0.42 if corner % 2 else 1.0
        angle = math.pi * corner / 5 - math.pi / 2
        corners.append((reach * math.cos(angle), 0.06 + reach * math.sin(angle)))
    draw.polygon(points(corners), fill=base)


def _stripe(canvas: Image.Image, radius: int) -> Image.Image:
    """White bars over the thing (everything that is not background)."""
    bars = canvas.copy()
    draw = ImageDraw.Draw(bars)
    for top in range(0, canvas.height, radius // 2):
        draw.rectangle([0, top, canvas.width, top + radius // 5], fill=(250, 250, 250))
    floor = Image.new("RGB", canvas.size, BACKGROUND)
    different = Image.frombytes(
        "L", canvas.size, bytes(255 * (a != b) for a, b in zip(_flat(canvas), _flat(floor), strict=True))
    )
    return Image.composite(bars, canvas, different)


def _flat(image: Image.Image) -> list[bytes]:
    data = image.tobytes()
    return [data[i : i + 3] for i in range(0, len(data), 3)]
