"""What a Layout says, position by position, written from its parts alone: the slow reference of chat.lay_out."""

import dataclasses
from typing import Any

from latent_jax.data.layout import Image, Layout, Read, Slots, Text

START, END, PAD = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"


@dataclasses.dataclass
class Position:
    """One token of the sequence. what: None for its own embedding, else ("image", index, row, column), ("slot", s),
    ("given", g) or ("written", s)."""

    token: int
    view: int
    axes: tuple[int, int, int]
    loss: bool = False
    late: bool = False
    hidden: bool = False
    regressed: bool = False
    what: tuple[Any, ...] | None = None


def read(layout: Layout, tokenizer, grids: dict[int, tuple[int, int]]) -> tuple[list[Position], list[int]]:
    """(positions, places that are read). `grids`: merged (rows, columns) of every image that is shown."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in (START, END, PAD)}
    positions: list[Position] = []
    reads: list[int] = []
    counts = {"slot": 0, "given": 0}
    after_trunk = 0
    for view, parts in enumerate((layout.trunk, *layout.views)):
        at = after_trunk
        first = len(positions)
        trunk = [p for p in positions if p.view == 0]
        for part in _with_texts_joined(parts):
            if isinstance(part, list):
                for token, flags, read_here in _words(part, tokenizer):
                    positions.append(Position(token, view, (at, at, at), **flags))
                    at += 1
                    reads += [len(positions) - 1] * read_here
            elif isinstance(part, Read):
                reads.append(len(positions) - 1 if len(positions) > first else len(trunk) - 1)
            else:
                marks = part.marks if isinstance(part, Slots) else True
                hidden = isinstance(part, Image) and part.hidden
                if marks:
                    loss = part.loss in (True, "open", "both")
                    positions.append(Position(ids[START], view, (at, at, at), loss=loss, hidden=hidden))
                    at += 1
                line = isinstance(part, Slots) and isinstance(part.shape, int)
                if line:
                    cells = [(0, column) for column in range(part.shape)]
                else:
                    rows, columns = part.shape if isinstance(part, Slots) else grids[part.index]
                    cells = [(row, column) for row in range(rows) for column in range(columns)]
                for row, column in cells:
                    axes = (at + column,) * 3 if line else (at, at + row, at + column)
                    position = Position(ids[PAD], view, axes, hidden=hidden)
                    if isinstance(part, Image):
                        position.what, position.regressed = ("image", part.index, row, column), part.loss
                    elif part.source == "given":
                        position.what, counts["given"] = ("given", counts["given"]), counts["given"] + 1
                    else:
                        kind = {"learned": "slot", "written": "written"}[part.source]
                        position.what, counts["slot"] = (kind, counts["slot"]), counts["slot"] + 1
                    positions.append(position)
                at += part.shape if line else max(rows, columns)
                if marks:
                    loss = isinstance(part, Slots) and part.loss == "both"
                    positions.append(Position(ids[END], view, (at, at, at), loss=loss, hidden=hidden))
                    at += 1
        if view == 0:
            after_trunk = at
    return positions, reads


def _with_texts_joined(parts):
    """Texts, and the reads between them, as lists; everything else as it is."""
    found = []
    for part in parts:
        if isinstance(part, Slots) and (part.shape, part.marks) == (0, False):
            continue  # nothing at all
        if isinstance(part, Text):
            if not (found and isinstance(found[-1], list)):
                found.append([])
            found[-1].append(part)
        elif isinstance(part, Read) and found and isinstance(found[-1], list):
            found[-1].append(part)
        else:
            found.append(part)
    return found


def _words(parts, tokenizer):
    """(token, flags, how many reads follow its last character) of texts that are tokenised as one string."""
    letters, reads = [], {}
    for part in parts:
        if isinstance(part, Text):
            letters += [(letter, part) for letter in part.text]
        else:
            reads[len(letters)] = reads.get(len(letters), 0) + 1
    text = "".join(letter for letter, _ in letters)
    found = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    tokens = list(zip(found["input_ids"], found["offset_mapping"], strict=True))
    for number, (token, (start, end)) in enumerate(tokens):
        owners = [part for _, part in letters[start:end]]
        flags = {"loss": any(p.loss for p in owners), "late": any(p.late for p in owners)}
        # A read behind character c belongs to the last token that holds any character up to c.
        following = tokens[number + 1][1][0] if number + 1 < len(tokens) else len(text) + 1
        yield token, flags, sum(count for at, count in reads.items() if start < at <= following)
