"""Pictures: what is drawn is what the numbers say, whatever captions, images and metrics are like."""

import io
import json

import numpy as np
import PIL.Image
import pytest
from PIL import ImageFont

from latent_jax.analysis import pictures
from latent_jax.errors import UserError

LINES = [{"step": step, "loss/total": 9.0 / step, "similarity/cosine": 1 - 1 / step} for step in range(1, 51)]
FRAME = (0, 128, 60)


def encoded(color, size=(40, 30), form="PNG") -> bytes:
    with io.BytesIO() as file:
        PIL.Image.new("RGB", size, color).save(file, format=form)
        return file.getvalue()


def record(index, **changes):
    made = {"key": str(index), "images": [encoded((40 * index % 256, 90, 200))], "captions": [f"number {index}"]}
    return made | changes


def latents(count):
    return np.random.default_rng(0).normal(size=(count, 3, 5))


def frames(image) -> int:
    """How many rows of pixels hold a frame's upper or lower edge."""
    return int(((np.asarray(image) == FRAME).all(-1).sum(1) >= pictures._THUMB).sum())


def test_the_own_image_is_framed_where_it_is_among_the_nearest():
    records, target = [record(index) for index in range(8)], latents(8)
    framed = pictures.neighbours(records, target, target, "validation")
    far = pictures.neighbours(records, -target, target, "validation")
    assert frames(framed) == pictures.SHOWN * 6  # two edges of three pixels each
    assert frames(far) == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"captions": [""]},
        {"captions": ["x" * 5000]},
        {"captions": ["\ud800 " + "word " * 400]},
        {"captions": ["猫 \u202e\n\x00 🐈"]},
        {"images": [b"no image"]},
        {"images": [encoded("red", (1, 190))]},
        {"images": [encoded("red", (1900, 10), "JPEG")]},
    ],
    ids=["empty", "one word", "surrogate", "scripts", "broken", "tall", "wide"],
)
def test_odd_records_are_drawn(changes, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    records = [record(0, **changes), record(1)]
    made, failed = pictures.draw(tmp_path, records, latents(2), latents(2), "validation")
    assert (made, failed) == ([pictures.CURVES, pictures.NEIGHBOURS], [])
    assert all(PIL.Image.open(tmp_path / name).size[0] > 1000 for name in made)


def test_what_cannot_be_drawn_is_one_line_each(tmp_path):
    made, failed = pictures.draw(tmp_path, [record(0)], latents(1), latents(1)[:, :, :2], "validation")
    assert made == [] and [line.partition(":")[0] for line in failed] == ["no curves.png", "no neighbours.png"]
    assert not any("\n" in line for line in failed) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "lines",
    [LINES, LINES[:1], [{**line, "loss/total": None} if line["step"] < 9 else line for line in LINES]],
    ids=["usual", "one step", "not finite"],
)
def test_curves_take_what_metrics_hold(lines):
    image = np.asarray(pictures.curves(lines))
    assert (image == pictures._COLORS[0]).all(-1).any(), "the total loss has a curve"


def test_curves_need_something_to_draw():
    for lines in ([], [{"step": 1}]):
        with pytest.raises(UserError, match=r"metrics\.jsonl has"):
            pictures.curves(lines)


def test_a_running_mean_is_over_fewer_at_the_ends():
    np.testing.assert_allclose(pictures._mean(np.array([1.0, 2, 3, 10]), 3), [1.5, 2, 5, 6.5])


@pytest.mark.parametrize("low,high", [(0, 8.1), (-0.04, 1), (0, 1e-6), (0, 0), (3, 3), (0, 1e9)])
def test_ticks_are_around_what_is_shown(low, high):
    ticks = pictures._ticks(low, high)
    assert ticks[0] <= low and ticks[-1] >= high and 3 <= len(ticks) <= 8


def test_text_is_wrapped_and_cut():
    font = ImageFont.load_default(12)
    lines = pictures.wrapped("one two three four five six seven eight", font, 60, 3)
    assert len(lines) == 3 and lines[0].startswith("one") and lines[-1].endswith("...")
    assert all(font.getlength(line) <= 60 for line in lines)
    assert " ".join(pictures.wrapped("one two three", font, 60, 5)) == "one two three"
    assert "".join(pictures.wrapped("x" * 50, font, 60, 20)) == "x" * 50
