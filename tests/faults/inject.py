"""Seeded injuries of one file: what a disk, a copy that was cut short, or an editor does to it."""

import json
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path

# Values of another type or size than a reader expects in their place.
_STRANGE = (None, True, -1, 0, 10**9, 2**63, 1e308, float("nan"), "", "\ud800", "x" * 5000, [], [[]], {}, {"a": None})
_DEPTH = 3000
HUGE = 4 * 2**30  # bytes, of which the disk holds those that are not zero
_REPLACEMENTS = ("directory", "pipe", "nowhere", "itself", "huge")


def injure(file: Path, draw: random.Random, others: Sequence[Path] = ()) -> str:
    """Injures `file` by one mutation that `draw` picks among those its content allows; returns what was done.

    `others` are files of its kind with other content: one of them may stand in its place."""
    content = file.read_bytes()
    able = [mutation for mutation in MUTATIONS if _fits(mutation, file, content, others)]
    mutation = draw.choice(able)
    if mutation in (delete, replace):
        file.unlink()
        return "delete" if mutation is delete else _replaced(file, draw.choice(_REPLACEMENTS), content)
    if mutation is another:
        other = draw.choice(others)
        _write(file, other.read_bytes())
        return f"replace by {other.parent.name}/{other.name}"
    if mutation is forbid:
        _write(file, content)
        file.chmod(0)
        return "forbid to read"
    changed, told = mutation(content, draw)
    if changed == content:  # a range that was zero, two equal blocks: as it was is no injury
        changed, told = flip(content, draw)
    _write(file, changed)
    return told


def flip(content: bytes, draw: random.Random) -> tuple[bytes, str]:
    at, bit = draw.randrange(len(content)), draw.randrange(8)
    changed = bytearray(content)
    changed[at] ^= 1 << bit
    return bytes(changed), f"flip bit {bit} of byte {at}"


def cut(content: bytes, draw: random.Random) -> tuple[bytes, str]:
    at = draw.randrange(len(content))
    return content[:at], f"cut after {at} of {len(content)} bytes"


def empty(content: bytes, draw: random.Random) -> tuple[bytes, str]:
    return b"", "empty"


def zero(content: bytes, draw: random.Random) -> tuple[bytes, str]:
    start, end = sorted(draw.sample(range(len(content) + 1), 2))
    return content[:start] + bytes(end - start) + content[end:], f"zero bytes {start} to {end}"


def append(content: bytes, draw: random.Random) -> tuple[bytes, str]:
    count = draw.choice((1, 7, 4096))
    return content + draw.randbytes(count), f"append {count} random bytes"


def swap(content: bytes, draw: random.Random) -> tuple[bytes, str]:
    size = max(1, min(512, len(content) // 4))
    first, second = sorted(draw.sample(range(len(content) // size), 2))
    a, b = first * size, second * size
    changed = content[:a] + content[b : b + size] + content[a + size : b] + content[a : a + size] + content[b + size :]
    return changed, f"swap the {size} bytes at {a} and {b}"


def duplicate(content: bytes, draw: random.Random) -> tuple[bytes, str]:
    lines = content.splitlines(keepends=True)
    at = draw.randrange(len(lines))
    return b"".join([*lines[: at + 1], *lines[at:]]), f"duplicate line {at + 1}"


def delete(content: bytes, draw: random.Random) -> tuple[bytes, str]:
    raise AssertionError("injure deletes by itself: there is no content left")


def replace(content: bytes, draw: random.Random) -> tuple[bytes, str]:
    raise AssertionError("injure replaces by itself: what comes is no file")


def another(content: bytes, draw: random.Random) -> tuple[bytes, str]:
    raise AssertionError("injure copies by itself: the content is another file's")


def forbid(content: bytes, draw: random.Random) -> tuple[bytes, str]:
    raise AssertionError("injure forbids by itself: the content stays")


def _replaced(file: Path, kind: str, content: bytes) -> str:
    if kind == "huge":
        file.write_bytes(content)
        os.truncate(file, HUGE)
        return "replace by itself and zeros, 4 GiB"
    if kind == "directory":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to(file.name if kind == "itself" else "nowhere")
    return f"replace by a {kind}" if kind in ("directory", "pipe") else f"replace by a link to {kind}"


def encode(content: bytes, draw: random.Random) -> tuple[bytes, str]:
    """As an editor on another system would save it."""
    text, how = content.decode(), draw.choice(("utf-8-sig", "utf-16", "line ends"))
    if how == "line ends":
        return text.replace("\n", "\r\n").encode(), "lines end in carriage returns too"
    return text.encode(how), f"encode as {how}"


def value(content: bytes, draw: random.Random) -> tuple[bytes, str]:
    """Another value somewhere in a JSON file, or in one line of a JSON-lines file."""
    lines = [content] if _is_json(content) else content.splitlines()
    at = draw.randrange(len(lines))
    document = json.loads(lines[at])
    places = list(_places(document, []))
    place = draw.choice(places)
    strange = draw.choice((*_STRANGE, _DEPTH))
    if strange is _DEPTH:
        text, told = json.dumps(_put(document, place, "@")).replace('"@"', "[" * _DEPTH + "]" * _DEPTH), "deep lists"
    else:
        text, told = json.dumps(_put(document, place, strange)), repr(strange)[:40]
    lines[at] = text.encode()
    where = ".".join(map(str, place)) or "all"
    return b"\n".join(lines), f"line {at + 1}: {where} becomes {told}"


def drop(content: bytes, draw: random.Random) -> tuple[bytes, str]:
    """One key of an object, or item of a list, of a JSON file goes."""
    document = json.loads(content)
    place = draw.choice([place for place in _places(document, []) if place])
    owner = document
    for key in place[:-1]:
        owner = owner[key]
    del owner[place[-1]]
    return json.dumps(document).encode(), f"drop {'.'.join(map(str, place))}"


MUTATIONS: tuple[Callable, ...] = (
    flip, cut, empty, zero, delete, append, swap, duplicate, value, drop, replace, encode, another, forbid,
)  # fmt: skip


def _fits(mutation: Callable, file: Path, content: bytes, others: Sequence[Path]) -> bool:
    if mutation is another:
        return bool(others)
    if mutation is forbid:
        return os.geteuid() != 0  # root reads what it likes
    if mutation in (delete, append, replace):
        return True
    if mutation is swap:
        return len(content) >= 8
    if mutation in (duplicate, encode):
        return _is_text(content)
    if mutation is value:
        return _is_json(content) or (
            file.suffix == ".jsonl" and bool(content) and all(map(_is_json, content.splitlines()))
        )
    if mutation is drop:
        return _is_json(content) and any(_places(json.loads(content), []))
    return bool(content)


def _is_text(content: bytes) -> bool:
    try:
        return bool(content) and "\0" not in content.decode()
    except UnicodeDecodeError:
        return False


def _is_json(content: bytes) -> bool:
    try:
        return bool(content.strip()) and content.strip()[:1] in b"{[" and json.loads(content) is not None
    except (ValueError, UnicodeDecodeError):
        return False


def _places(node, here: list):
    """The path of every value, the document's own [] first; at most 8 items of a container, so that lists of records
    do not drown what stands once."""
    yield here
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in list(items)[:8]:
        yield from _places(child, [*here, key])


def _put(document, place: list, new):
    if not place:
        return new
    owner = document
    for key in place[:-1]:
        owner = owner[key]
    owner[place[-1]] = new
    return document


def _write(file: Path, content: bytes) -> None:
    """A new file, never through a hard link that another file of the folder may share."""
    temporary = file.with_name(f"{file.name}.injured")
    temporary.write_bytes(content)
    os.replace(temporary, file)
