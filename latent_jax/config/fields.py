"""One typed setting: what it takes, how a command line spells it, and the sentence that says so when it is wrong.

A section of the config is a frozen dataclass whose fields are made by `option`. The annotation is the type: `int`,
`float`, `bool`, `str`, a `tuple[...]` of those, or a union of these; the metadata narrows it.
"""

import ast
import dataclasses
import difflib
import functools
import itertools
import math
import reprlib
import struct
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from latent_jax.errors import UserError

T = TypeVar("T")
Annotation = Any  # int, tuple[int, ...], float | None: a type, or what typing makes of several
Limits = Mapping[str, Any]  # the metadata of an option


def option(
    default: T,
    doc: str,
    *,
    choices: Sequence[object] | None = None,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    ascending: bool = False,
    resumable: bool = False,
) -> T:
    """A dataclass field with its documentation and its limits; to a type checker its default.

    Args:
      default: the value where nothing is said; must itself be allowed.
      doc: half a sentence for `--help`, with the unit.
      choices: the only values allowed.
      low, high: inclusive limits; they hold for every number inside a tuple.
      above, below: exclusive limits.
      ascending: of a tuple of tuples, each begins with a larger number than the one before.
      resumable: a run may be resumed with another value, because no trained number depends on it, but for the order in
        which the same numbers are added.
    """
    limits = dict(doc=doc, choices=choices, low=low, high=high, above=above, below=below)
    made: Any = dataclasses.field(default=default, metadata={**limits, "ascending": ascending, "resumable": resumable})
    return made


def annotations(section: type) -> dict[str, Any]:
    """Field name -> annotation with strings resolved."""
    return _annotations(section)


@functools.cache
def _annotations(section: Any) -> dict[str, Any]:
    return typing.get_type_hints(section)


def expected(annotation: Annotation, limits: Limits) -> str:
    """What a field takes, as words: 'an integer >= 1', 'one of cosine, l2'."""
    if limits.get("choices"):
        return "one of " + ", ".join(str(choice) or "''" for choice in limits["choices"])
    return _named(annotation) + _range(limits)


def check(key: str, value: object, annotation: Annotation, limits: Limits) -> Any:
    """Returns `value` in the annotated type (an int becomes a float, a list a tuple).

    Raises UserError naming `key`, the value and what was expected.
    """
    fitted = _fit(value, annotation)
    choices = limits.get("choices")
    if fitted is _NO or not _inside(fitted, limits) or (choices and fitted not in choices):
        near = _suggest(value, choices) if choices and isinstance(value, str) else ""
        raise UserError(f"{key}: got {shown(value)}, expected {expected(annotation, limits)}{near}")
    if (odd := _not_float32(fitted)) is not None:
        raise UserError(
            f"{key}: got {odd:g}, which the float32 of a step cannot hold; expected {expected(annotation, limits)}, "
            f"and 0 or {_SMALLEST:.2g} to {_LARGEST:.2g} in size"
        )
    if limits.get("ascending") and not all(a[0] < b[0] for a, b in itertools.pairwise(fitted or ())):
        firsts = ", ".join(f"{point[0]:g}" for point in fitted)
        raise UserError(f"{key}: got points at {firsts}, expected each later than the one before")
    return fitted


def shown(value: object) -> str:
    """A value as a message shows it, cut short: a wrong one may be as long as its file."""
    text = reprlib.repr(value) if isinstance(value, dict | list | tuple) and len(value) > 20 else repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def read(kind: type, name: str, source: Mapping[str, Any], *keys: str, default: object = None, inside: str = "") -> Any:
    """A field of the dataclass `kind` out of a JSON object, checked as the field is declared (type and range).

    The first of `keys` (the field's name by default) that is not null counts; `inside` goes before a key in messages.
    Raises UserError naming the key that is wrong, or missing where there is no default.
    """
    keys = keys or (name,)
    key = next((key for key in keys if source.get(key) is not None), None)
    if key is None and default is None:
        raise UserError(f"key '{inside}{keys[0]}' is missing")
    value = default if key is None else source[key]
    limits = next(field for field in dataclasses.fields(kind) if field.name == name).metadata
    return check(f"{inside}{key or keys[0]}", value, annotations(kind)[name], limits)


def parse(key: str, text: str, annotation: Annotation, limits: Limits) -> Any:
    """Reads a command line's text as the annotated type, then checks it as `check` does.

    Booleans are true/false/1/0, tuples `1,2` or `(1, 2)`, a string stands for itself.
    """
    return check(key, _read(text, annotation), annotation, limits)


def unknown(key: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that does not exist, with the nearest that does."""
    return UserError(f"{key}: no such key{_suggest(name, known) or '; known: ' + ', '.join(sorted(known))}")


def _suggest(name: str, known: Iterable[object]) -> str:
    near = difflib.get_close_matches(name, [str(one) for one in known], n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else ""


class _No:
    """Stands for 'does not fit': None could be a value."""


_NO = _No()
_SMALLEST, _LARGEST = 2.0**-126, (2 - 2**-23) * 2.0**127  # float32's normal numbers


def _parts(annotation: Annotation) -> tuple[Annotation, ...]:
    """The members of a union, or the annotation alone."""
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return typing.get_args(annotation)
    return (annotation,)


def known(annotation: Annotation) -> bool:
    """Whether an option may have this type."""
    parts = _parts(annotation)
    if len(parts) > 1:
        return all(map(known, parts))
    if typing.get_origin(annotation) is tuple:
        return all(member is Ellipsis or known(member) for member in typing.get_args(annotation))
    return annotation in _NAMES


def _fit(value: object, annotation: Annotation) -> Any:
    for part in _parts(annotation):
        fitted = _fit_one(value, part)
        if fitted is not _NO:
            return fitted
    return _NO


def _fit_one(value: object, annotation: Annotation) -> Any:
    if annotation is types.NoneType:
        return None if value is None else _NO
    if typing.get_origin(annotation) is tuple:
        return _fit_tuple(value, typing.get_args(annotation))
    if annotation is float:
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            return _NO
        try:
            return float(value) if math.isfinite(value) else _NO
        except OverflowError:  # an integer beyond every float
            return _NO
    # bool is a subclass of int, yet `steps=True` is a slip.
    return value if type(value) is annotation else _NO


def _fit_tuple(value: object, members: tuple[Annotation, ...]) -> Any:
    if not isinstance(value, (tuple, list)):
        return _NO
    if len(members) == 2 and members[1] is Ellipsis:
        members = (members[0],) * len(value)
    if len(value) != len(members):
        return _NO
    fitted = tuple(_fit(one, member) for one, member in zip(value, members))
    return _NO if any(one is _NO for one in fitted) else fitted


def _inside(value: object, limits: Limits) -> bool:
    if isinstance(value, tuple):
        return all(_inside(one, limits) for one in value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return True
    low, high, above, below = (limits.get(name) for name in ("low", "high", "above", "below"))
    if (low is not None and value < low) or (above is not None and value <= above):
        return False
    # A step computes with what float32 makes of it, which may be the limit itself.
    return (high is None or value <= high) and (below is None or _float32(value) < below)


def _not_float32(value: object) -> float | None:
    """The first float in `value` that float32 would make infinite, or (subnormal ones too, on a CPU) zero."""
    if isinstance(value, tuple):
        return next((odd for one in value if (odd := _not_float32(one)) is not None), None)
    if not isinstance(value, float) or value == 0 or _SMALLEST <= abs(value) <= _LARGEST:
        return None
    return value


def _float32(value: float) -> float:
    """The nearest float32 of a number within its range."""
    return struct.unpack("f", struct.pack("f", value))[0]


def _named(annotation: Annotation) -> str:
    if typing.get_origin(annotation) is tuple:
        members = typing.get_args(annotation)
        if len(members) == 2 and members[1] is Ellipsis:
            inner = "tuples" if typing.get_origin(members[0]) is tuple else _NAMES[members[0]].split()[-1] + "s"
            return f"a tuple of {inner}"
        return "(" + ", ".join(_named(member) for member in members) + ")"
    return " or ".join(_NAMES.get(part) or _named(part) for part in _parts(annotation))


_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "a string", types.NoneType: "none"}


def _range(limits: Limits) -> str:
    low, high, above, below = (limits.get(name) for name in ("low", "high", "above", "below"))
    if low is not None and high is not None:
        return f" in {low}..{high}"
    signs = ((">=", low), (">", above), ("<=", high), ("<", below))
    bounds = [f"{sign} {bound}" for sign, bound in signs if bound is not None]
    return (" " + " and ".join(bounds)) if bounds else ""


def _read(text: str, annotation: Annotation) -> Any:
    parts = _parts(annotation)
    if bool in parts and text.lower() in ("true", "false", "1", "0"):
        return text.lower() in ("true", "1")
    if types.NoneType in parts and text.lower() == "none":
        return None
    tuples = [part for part in parts if typing.get_origin(part) is tuple]
    if parts == (str,):
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):  # the last two: too deeply nested
        # `a,b` is a tuple of strings that nobody wants to quote on a command line.
        value = tuple(text.split(",")) if tuples and len(parts) == 1 else text
    if tuples and len(parts) == 1 and not isinstance(value, (tuple, list)):
        value = (value,)
    return value
