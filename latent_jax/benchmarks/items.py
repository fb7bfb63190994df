"""What the benchmarks share: a question to ask, and a question with its scored reply."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

PLACE = "<image>"
MOST_CHARACTERS = 100_000
_MARK = re.compile(r"<\|[A-Za-z_]+\|>")


@dataclasses.dataclass(frozen=True)
class Item:
    """A question of a record.

    id: the benchmark's own. record: place of the record in its source. images: how many images it shows.
    cluster: what resampling must keep together, such as the questions about one image.
    """

    id: str
    question: dict[str, Any]
    record: int
    images: int
    cluster: str


class Reply(str):
    """The text of a reply in which a model may write latents, with the spans of them that it opened and closed."""

    spans: tuple[int, int]

    def __new__(cls, text: str, opened: int, closed: int) -> "Reply":
        reply = super().__new__(cls, text)
        reply.spans = opened, closed
        return reply


@dataclasses.dataclass(frozen=True)
class ScoredItem:
    """A question with the reply to it and its score; `correct` is None where the answer is hidden."""

    item: Item
    reply: str
    parsed: str | None
    correct: bool | None
    skipped: str = ""  # why it was not asked: then it has no reply and counts as wrong
    spans: tuple[int, int] | None = None  # of latents, that the reply opened and closed; None: a model without any

    @property
    def right(self) -> bool:
        """Whether it counts as right."""
        return bool(self.correct)


def conversation(prompt: str, images: Sequence[Any], imagine: bool = False) -> list[dict]:
    """One user turn in HF chat format: the images in order before the prompt, or each where it says `<image>`; at the
    end, with `imagine`, what asks for latents."""
    shown = [{"type": "image", "image": image} for image in images]
    pieces = [{"type": "text", "text": piece} for piece in prompt.split(PLACE)]
    if shown and len(pieces) == len(shown) + 1:
        content = [part for pair in zip(pieces, [*shown, None], strict=True) for part in pair if part]
        content = [part for part in content if part.get("text") != ""]
    else:
        content = [*shown, {"type": "text", "text": prompt}]
    content += [{"type": "imagine"}] * imagine
    return [{"role": "user", "content": content}]


def check_text(prompt: str) -> None:
    """Raises ValueError where a text cannot be sent as what it is: marks of the conversation itself, such as
    `<|image_pad|>`, what no encoding can hold, or more than any model reads."""
    if mark := _MARK.search(prompt):
        raise ValueError(f"its text holds {mark[0]}, a token of the conversation itself")
    if len(prompt) > MOST_CHARACTERS:
        raise ValueError(f"its text has {len(prompt):,} characters, expected at most {MOST_CHARACTERS:,}")
    try:
        prompt.encode()
    except UnicodeEncodeError as problem:
        raise ValueError(f"its text holds half a character ({ascii(prompt[problem.start])})") from None


def field(question: Mapping[str, Any], name: str, kind: type | tuple[type, ...]) -> Any:
    """An official field. Raises ValueError that names it where it is missing or of another type."""
    if name not in question:
        raise ValueError(f"has no {name!r}")
    if not isinstance(question[name], kind) or (kind is int and isinstance(question[name], bool)):
        raise ValueError(f"{name!r} is {question[name]!r}, expected {_WORDS.get(kind, kind)}")
    return question[name]


def texts(question: Mapping[str, Any], name: str, least: int = 1, most: int | None = None) -> list[str]:
    """An official field that is a list of texts."""
    found = field(question, name, list)
    if len(found) < least or not all(isinstance(text, str) for text in found):
        raise ValueError(f"{name!r} is {found!r}, expected a list of at least {least} texts")
    if most is not None and len(found) > most:
        raise ValueError(f"{name!r} has {len(found)} texts, expected at most {most}")
    return found


_WORDS: dict[Any, str] = {str: "a text", int: "an integer", list: "a list", dict: "a dict", bool: "true or false"}
