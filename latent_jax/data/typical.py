"""Parts of a record of typical length, for `plan`: what a method's `typical` makes its records of."""

import functools
import io

import PIL.Image

# Common words: each is one token to a published tokenizer.
_WORDS = ("the", "red", "cube", "is", "on", "the", "left", "of", "a", "large", "green", "ball", "and", "two", "cones")


@functools.cache
def image(width: int, height: int, number: int = 0) -> bytes:
    """A PNG file of one colour, of this size in pixels. It is a real image of a few kilobytes: it may be decoded.

    number: images of different numbers differ. Equal ones of a conversation are one image, which is encoded once.
    """
    file = io.BytesIO()
    PIL.Image.new("RGB", (width, height), (number, 128, 128)).save(file, "png")
    return file.getvalue()


def words(count: int) -> str:
    """So many words of plain English."""
    return " ".join(_WORDS[number % len(_WORDS)] for number in range(count))
