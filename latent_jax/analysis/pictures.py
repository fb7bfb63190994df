"""Two pictures that every pretraining run leaves: how training went, and which images the imagined latents resemble.

Drawn with Pillow, which reading images needs anyway: matplotlib (the extra `plots`) is no part of a plain install. A
picture shows what metrics.jsonl and the report hold, and of the held-out records the first ones, never chosen ones.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont

from latent_jax.analysis.geometry import nearest
from latent_jax.data.images import open_image
from latent_jax.errors import UserError, one_line
from latent_jax.runtime import files, metrics

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
CURVES, NEIGHBOURS = "curves.png", "neighbours.png"
# Captions that are shown, and nearest images of each.
SHOWN, NEAREST = 6, 5
_INK, _GRAY, _RULE, _OWN = (32, 32, 32), (112, 112, 112), (222, 222, 222), (0, 128, 60)
# Okabe and Ito's colours, which the colour-blind can tell apart.
_COLORS = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167))
_MARGIN, _THUMB, _WORDS = 24, 148, 250
_LOSSES = {"loss/total": "total, weighted", "loss/next_token": "next token", "loss/similarity": "similarity"}
_LOSSES |= {"loss/alignment": "alignment"}
_MATCHES = {"similarity/cosine": "cosine, predicted to true latent", "alignment/accuracy": "matched in the batch"}
_MATCHES |= {"next_token/accuracy": "next token right"}


def draw(
    directory: Path, records: Sequence[dict], predicted: np.ndarray, target: np.ndarray, split: str
) -> tuple[list[str], list[str]]:
    """Writes both pictures into the workdir. Returns the names that were written, and a line for each that was not.

    Args:
      records: the held-out records; predicted, target: (E, S, Z), their latents in the same order.

    Raises nothing: a picture is not worth a run.
    """
    made, failed = [], []
    pictures = {
        CURVES: lambda: curves(metrics.read(directory / "metrics.jsonl")),
        NEIGHBOURS: lambda: neighbours(records, predicted, target, split),
    }
    for name, picture in pictures.items():
        try:
            image = picture()
            with files.whole(directory / name) as file:
                image.save(file, format="PNG")
            made.append(name)
        except Exception as problem:  # whatever it is, the run's numbers are worth more
            failed.append(f"no {name}: {one_line(problem) or type(problem).__name__}")
    return made, failed


# ---------------------------------------------------------------- neighbours


def neighbours(
    records: Sequence[dict],
    predicted: Float[np.ndarray, "E S Z"],
    target: Float[np.ndarray, "E S Z"],
    split: str,
) -> Image.Image:
    """For the first captions: the image that each describes, and those whose true latents its imagined ones are
    nearest to, by the cosine of all slots together, as in the report's retrieval. The own image is framed."""
    shown, count = min(SHOWN, len(records)), min(NEAREST, len(records))
    order, cosine, ranks = nearest(predicted[:shown], target, count)
    title = f"Which held-out images do the imagined latents resemble? (the first {shown} of {len(records)}, {split})"
    notes = [
        "Latents are predicted from the caption alone. Right of the line: the images whose true latents are nearest to "
        "them, nearest first,",
        f"of all {len(records)} held-out images, with the cosine and their own captions. Framed: the image that the "
        f"caption describes (first by chance: 1 in {len(records)}).",
    ]
    tall = _THUMB + 66
    top, left = 100, _MARGIN + _WORDS + 18
    start = left + _THUMB + 28  # of the neighbours
    width = max(start + count * (_THUMB + 14) - 14, 1120) + _MARGIN
    canvas, pen = _canvas(width, top + shown * (tall + 14) + 8)
    _say(pen, (_MARGIN, 14), title, 18, width - 2 * _MARGIN, 1)
    for line, note in enumerate(notes):
        _say(pen, (_MARGIN, 40 + 17 * line), note, 13, width - 2 * _MARGIN, 1, _GRAY)
    _say(pen, (_MARGIN, top - 22), "caption", 13, _WORDS, 1)
    _say(pen, (left, top - 22), "its image", 13, _THUMB, 1)
    _say(pen, (start, top - 22), "nearest to what was imagined from the caption", 13, 600, 1)
    pen.line([(left + _THUMB + 14, top - 20), (left + _THUMB + 14, canvas.height - 20)], _RULE, 2)
    thumbs = {}

    def place(index: int, at: tuple[int, int], own: bool = False) -> None:
        if index not in thumbs:
            thumbs[index] = _thumbnail(records[index])
        thumb = thumbs[index]
        where = (at[0] + (_THUMB - thumb.width) // 2, at[1] + (_THUMB - thumb.height) // 2)
        canvas.paste(thumb, where)
        if own:
            pen.rectangle([at[0] - 4, at[1] - 4, at[0] + _THUMB + 3, at[1] + _THUMB + 3], outline=_OWN, width=3)

    for row in range(shown):
        y = top + row * (tall + 14)
        _say(pen, (_MARGIN, y), records[row]["captions"][0], 13, _WORDS, 9)
        place(row, (left, y))
        rank = f"own image: place {ranks[row]} of {len(records)}"
        _say(pen, (left, y + _THUMB + 5), rank, 12, _THUMB + 4, 2, _OWN if ranks[row] == 1 else _INK)
        for column in range(count):
            index, x = int(order[row, column]), start + column * (_THUMB + 14)
            place(index, (x, y), own=index == row)
            _say(pen, (x, y + _THUMB + 5), f"cosine {cosine[row, column]:.2f}", 12, _THUMB, 1)
            _say(pen, (x, y + _THUMB + 21), records[index]["captions"][0], 11, _THUMB, 3, _GRAY)
    return canvas


def _thumbnail(record: dict) -> Image.Image:
    try:
        image = open_image(record["images"][0], record["key"])
    except UserError:  # its size was right, so it has a latent; an empty place says the rest
        return Image.new("RGB", (_THUMB, _THUMB), _RULE)
    scale = _THUMB / max(image.size)
    return image.resize(
        [max(1, round(side * scale)) for side in image.size], Image.Resampling.BICUBIC, reducing_gap=2.0
    )


# ---------------------------------------------------------------- curves


@dataclasses.dataclass(frozen=True)
class _Panel:
    """An area for curves: its place in pixels, and the ranges of steps and values that it shows."""

    box: tuple[int, int, int, int]
    steps: tuple[float, float]
    values: tuple[float, float]

    def at(self, step: float, value: float) -> tuple[float, float]:
        left, top, right, bottom = self.box
        (first, last), (low, high) = self.steps, self.values
        return (
            left + (step - first) / (last - first) * (right - left),
            bottom - (value - low) / (high - low) * (bottom - top),
        )


def curves(lines: Sequence[Mapping]) -> Image.Image:
    """The losses, and how well predictions match, against the step: every line of metrics.jsonl, and a running mean.

    These are training batches, not held-out data. Raises UserError where there is nothing to draw.
    """
    if not lines:
        raise UserError("metrics.jsonl has no lines")
    window = max(1, len(lines) // 25)
    canvas, pen = _canvas(1180, 500)
    _say(pen, (_MARGIN, 14), "Training, batch by batch", 18, 1100, 1)
    note = f"Pale: every logged step. Strong: the mean of {window} logged steps around it. Training data, not held-out."
    _say(pen, (_MARGIN, 40), note, 13, 1100, 1, _GRAY)
    note = (
        "similarity: predicted to true latents; alignment, matched: each caption with its own image among the batch's."
    )
    _say(pen, (_MARGIN, 58), note, 13, 1100, 1, _GRAY)
    _curves(canvas, lines, _LOSSES, "loss", (76, 130, 570, 440), window)
    _curves(canvas, lines, _MATCHES, "cosine, share", (660, 130, 1154, 440), window)
    return canvas


def _curves(
    canvas: Image.Image,
    lines: Sequence[Mapping],
    names: Mapping[str, str],
    title: str,
    box: tuple[int, int, int, int],
    window: int,
) -> None:
    """One panel with the curves of `names` (metric -> label) that the lines hold, and its legend above."""
    pen = ImageDraw.Draw(canvas)
    found = {}
    for name, label in names.items():
        pairs = [(line["step"], line[name]) for line in lines if isinstance(line.get(name), int | float)]
        if pairs:
            found[label] = np.array(pairs, np.float64)
    if not found:
        raise UserError(f"metrics.jsonl has none of {', '.join(names)}")
    steps = [line["step"] for line in lines]
    values = np.concatenate([points[:, 1] for points in found.values()])
    low, high = np.quantile(values, (0.05, 0.995))
    means = np.concatenate([_mean(points[:, 1], window) for points in found.values()])
    low, high = min(low, means.min()), max(high, means[len(means) // 2 :].max())
    ticks = _ticks(min(0.0, float(low)), float(high))
    panel = _Panel(box, (min(steps), max(max(steps), min(steps) + 1)), (ticks[0], ticks[-1]))
    left, top, right, bottom = box
    for tick in ticks:
        y = panel.at(steps[0], tick)[1]
        pen.line([(left, y), (right, y)], _RULE)
        pen.text((left - 8, y), f"{tick:g}", _INK, _font(12), anchor="rm")
    # Whole steps only, and the last one: how long the run was.
    marks = [tick for tick in _ticks(0, panel.steps[1]) if panel.steps[0] <= tick < panel.steps[1] and tick % 1 == 0]
    room = 0.07 * (panel.steps[1] - panel.steps[0])
    for step in [*(mark for mark in marks if panel.steps[1] - mark > room), panel.steps[1]]:
        x = panel.at(step, ticks[0])[0]
        pen.line([(x, bottom), (x, bottom + 5)], _INK)
        pen.text((x, bottom + 8), f"{step:g}", _INK, _font(12), anchor="mt")
    pen.line([(left, top), (left, bottom), (right, bottom)], _INK)
    pen.text(((left + right) / 2, bottom + 28), "step", _INK, _font(13), anchor="mt")
    pen.text((left - 44, top - 50), title, _INK, _font(14))
    for color, points in zip(_COLORS, found.values(), strict=False):
        _line(canvas, panel, points, _pale(color), 1)
    across = left
    for color, (label, points) in zip(_COLORS, found.items(), strict=False):
        _line(canvas, panel, np.stack([points[:, 0], _mean(points[:, 1], window)], 1), color, 3)
        pen.line([(across, top - 16), (across + 18, top - 16)], color, 3)
        pen.text((across + 23, top - 16), label, _INK, _font(12), anchor="lm")
        across += 23 + math.ceil(_font(12).getlength(label)) + 14


def _pale(color: tuple[int, int, int]) -> tuple[int, int, int]:
    red, green, blue = ((255 * 2 + part) // 3 for part in color)
    return red, green, blue


def _line(canvas: Image.Image, panel: _Panel, points: np.ndarray, color: tuple[int, int, int], width: int) -> None:
    """A curve, cut off at the panel's edges (outliers of the first steps), drawn at twice the size: smooth edges."""
    left, top, right, bottom = panel.box
    mask = Image.new("L", (2 * (right - left), 2 * (bottom - top)))
    places = [panel.at(step, value) for step, value in points]
    places = [(2 * (x - left), 2 * (y - top)) for x, y in places]
    ImageDraw.Draw(mask).line(places if len(places) > 1 else places * 2, 255, 2 * width, joint="curve")
    canvas.paste(color, (left, top), mask.resize((right - left, bottom - top), Image.Resampling.BOX))


def _mean(values: np.ndarray, window: int) -> np.ndarray:
    """Centred running mean over `window` values, over fewer at the ends."""
    ones = np.ones(min(window, len(values)))
    return np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers of which the first is <= low and the last >= high."""
    high = high if high > low else low + 1
    raw = (high - low) / 5
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= raw)
    return [round(step * count, 12) for count in range(math.floor(low / step), math.ceil(high / step) + 1)]


# ---------------------------------------------------------------- words


def _canvas(width: int, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    canvas = Image.new("RGB", (width, height), "white")
    return canvas, ImageDraw.Draw(canvas)


def _font(size: int) -> Font:
    return ImageFont.load_default(size)


def _say(
    pen: ImageDraw.ImageDraw,
    at: tuple[float, float],
    text: str,
    size: int,
    width: int,
    lines: int,
    color: tuple[int, int, int] = _INK,
) -> None:
    """Writes text at its upper left corner in at most `lines` lines of `width` pixels."""
    for number, line in enumerate(wrapped(text, _font(size), width, lines)):
        pen.text((at[0], at[1] + number * round(1.3 * size)), line, color, _font(size))


def wrapped(text: str, font: Font, width: int, lines: int) -> list[str]:
    """Text in lines of at most `width` pixels, broken at spaces, inside words where one is too long; what is too much
    for `lines` ends in dots."""
    # As many characters as could fit at all: captions may be pages.
    words = text.encode("utf-8", "replace").decode()[: lines * width].split()
    found: list[str] = []
    line = ""
    while words and len(found) < lines:
        word = words.pop(0)
        longer = f"{line} {word}".strip()
        if font.getlength(longer) <= width:
            line = longer
        elif line:
            found.append(line)
            line, words = "", [word, *words]
        else:
            fits = next(n for n in range(len(word), 0, -1) if n == 1 or font.getlength(word[:n]) <= width)
            found.append(word[:fits])
            words = [word[fits:], *words] if word[fits:] else words
    if line and len(found) < lines:
        found.append(line)
        line = ""
    if (line or words) and found:
        last = found[-1]
        while last and font.getlength(last + " ...") > width:
            last = last[:-1]
        found[-1] = last.rstrip(" ,.") + " ..."
    return found
