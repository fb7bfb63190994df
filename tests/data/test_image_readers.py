"""The two readers agree on everything but the pixels, whatever the file, and one of them does not decode."""

import dataclasses
import io

import numpy as np
import PIL.Image
import pytest

from latent_jax.data.image_readers import ImageDecoder, SizeReader, image_size
from latent_jax.data.image_spec import ImageSpec
from latent_jax.errors import UserError

SPEC = ImageSpec(min_pixels=28 * 28)


def encoded(size, kind, orientation=None, mode="RGB"):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    exif = PIL.Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).convert(mode).save(buffer, kind, exif=exif)
    return buffer.getvalue()


def assert_same_but_pixels(decoded, sized):
    for field in dataclasses.fields(decoded):
        one, other = getattr(decoded, field.name), getattr(sized, field.name)
        if field.name == "patches":
            assert one.shape == other.shape and one.dtype == other.dtype and not np.any(other)
        else:
            np.testing.assert_array_equal(one, other, field.name)


@pytest.mark.parametrize("orientation", [None, 1, 3, 5, 6, 8])
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_stills(kind, orientation, tmp_path):
    data = encoded((120, 61), kind, orientation)
    decoded = ImageDecoder(SPEC).still(data, "x")
    assert_same_but_pixels(decoded, SizeReader(SPEC).still(data, "x"))
    (tmp_path / "image").write_bytes(data)
    assert_same_but_pixels(decoded, SizeReader(SPEC).still(tmp_path / "image", "x"))


def test_a_png_that_turns_itself_behind_its_pixels():
    data = encoded((120, 61), "png", 6)
    start = data.index(b"eXIf") - 4
    length = int.from_bytes(data[start : start + 4], "big") + 12
    late = data[:start] + data[start + length : -12] + data[start : start + length] + data[-12:]
    assert ImageDecoder(SPEC).still(late, "x").grid == ImageDecoder(SPEC).still(data, "x").grid
    assert_same_but_pixels(ImageDecoder(SPEC).still(late, "x"), SizeReader(SPEC).still(late, "x"))


@pytest.mark.parametrize(
    "source", [np.zeros((40, 90, 3), np.uint8), PIL.Image.new("RGBA", (90, 40))], ids=["array", "pil"]
)
def test_images_in_memory(source):
    assert_same_but_pixels(ImageDecoder(SPEC).still(source, "x"), SizeReader(SPEC).still(source, "x"))


def test_videos():
    frames = [encoded((90, 61), "png") for _ in range(3)]
    assert_same_but_pixels(ImageDecoder(SPEC).video(frames, "x"), SizeReader(SPEC).video(frames, "x"))
    with pytest.raises(UserError, match="frames of one size"):
        SizeReader(SPEC).video([*frames, encoded((61, 90), "png")], "x")


def test_only_the_header_is_read():
    for kind in ("jpeg", "png"):
        data = encoded((400, 300), kind)[:1000]
        assert image_size(data) == (400, 300)
        with pytest.raises(UserError, match="not a whole image"):
            ImageDecoder(SPEC).still(data, "x")


@pytest.mark.parametrize(
    ("source", "message"),
    [(b"broken", "r1: not an image"), (b"", "r1: not an image"), ("absent.png", "r1: absent.png: no such image file")],
)
def test_what_is_no_image_is_named_as_when_drawn(source, message):
    for read in (ImageDecoder(SPEC), SizeReader(SPEC)):
        with pytest.raises(UserError, match=message):
            read.still(source, "r1")
    with pytest.raises(UserError, match="r1: 1000x2 pixels"):
        SizeReader(SPEC).still(encoded((1000, 2), "png"), "r1")
