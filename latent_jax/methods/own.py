"""A method of one's own: a fault of its code is one line that names the part of the method and the place.

The package's own methods are not looked after: an exception of theirs is a fault of ours and keeps its traceback.
"""

import dataclasses
import functools
import importlib
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from latent_jax.data.layout import Room
from latent_jax.errors import UserError, one_line
from latent_jax.methods.contract import CachedTargets, Method, Span, Statistics, Think

_LONGEST = 400  # characters of an exception's message: jax's may fill a page
_BESIDE = {"config", "layout", "images"}  # a class; what sees one record, whose key is then named (pipeline.naming)
_RESULTS: dict[str, type] = {"room": Room, "passes": int}


def load(name: str) -> ModuleType | None:
    """The module of a dotted name; None where there is none.

    Raises UserError where it cannot be imported: what it lacks in its turn, or whatever it raises.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as missing:
        if f"{name}.".startswith(f"{missing.name}."):
            return None
        raise UserError(f"config.method: module {name!r} cannot be imported: {missing}") from None
    except (Exception, SystemExit) as problem:
        raise UserError(f"config.method: module {name!r} cannot be imported: {fault(problem)}") from problem


def guarded(method: Method, module: ModuleType) -> Method:
    """The method with functions whose exceptions are UserErrors: part, exception, file and line."""
    return _guarded(method, module, "Method")


def _guarded(part: Any, module: ModuleType, name: str) -> Any:
    found = {}
    for field in dataclasses.fields(part):
        value, where = getattr(part, field.name), f"{name}.{field.name}"
        if isinstance(value, Think | Span | Statistics | CachedTargets):
            found[field.name] = _guarded(value, module, type(value).__name__)
        elif callable(value) and field.name not in _BESIDE:
            found[field.name] = _told(value, module, where, _RESULTS.get(field.name))
    return dataclasses.replace(part, **found)


def _told(function: Callable, module: ModuleType, where: str, kind: type | None) -> Callable:
    """The function itself, but for how its faults are told."""
    name, file = module.__name__, getattr(module, "__file__", None)

    @functools.wraps(function, updated=())
    def call(*arguments: Any, **options: Any) -> Any:
        try:
            found = function(*arguments, **options)
        except (UserError, MemoryError):
            raise
        except Exception as problem:
            if "RESOURCE_EXHAUSTED" in str(problem):  # the device is too small, and the code is right
                raise
            raise UserError(f"config.method: {where} of {name}: {fault(problem, file)}") from problem
        if kind and (not isinstance(found, kind) or isinstance(found, bool)):
            raise UserError(f"config.method: {where} of {name} returned {found!r:.100}, expected {kind.__name__}")
        return found

    return call


def fault(problem: BaseException, file: str | None = None) -> str:
    """`KeyError: 'x' (own.py:12)`: an exception and its place, in `file` where it went through that."""
    frames = traceback.extract_tb(problem.__traceback__)
    imported = [at for at, frame in enumerate(frames, 1) if frame.filename.startswith("<frozen importlib")]
    if file is None and imported:  # the line of the module that was being imported
        file = next((frame.filename for frame in frames[imported[-1] :]), None)
    own = [frame for frame in frames if frame.filename == file] or frames[-1:]
    place = f" ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else ""
    if isinstance(problem, SyntaxError):
        place, problem = f" ({Path(str(problem.filename)).name}:{problem.lineno})", SyntaxError(problem.msg)
    message = one_line(problem)
    return f"{type(problem).__name__}: {message if len(message) <= _LONGEST else message[:_LONGEST] + ' ...'}{place}"
