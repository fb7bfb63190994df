"""Training methods, one file each: what the model sees (host) and what it is scored on (device).

A module is a method where it has a `METHOD`; `find` looks in this package first, and then for any module of the name.
"""

import functools
import importlib
import pkgutil
from types import ModuleType

from latent_jax.errors import UserError
from latent_jax.methods.contract import Method


def names() -> list[str]:
    """The methods of this package."""
    found = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return [name for name in found if hasattr(importlib.import_module(f"{__name__}.{name}"), "METHOD")]


@functools.cache
def find(name: str) -> Method:
    """The method of a name: a module of this package, or one of your own that Python finds (`my_package.my_method`).

    Raises UserError where there is none.
    """
    if isinstance(name, str) and all(part.isidentifier() for part in name.split(".")):
        for full in (f"{__name__}.{name}", name):
            method = getattr(_module(full), "METHOD", None)
            if isinstance(method, Method):
                return method
    raise UserError(
        f"config.method: got {name!r:.100}, expected one of {', '.join(names())}, or a module of your own with a METHOD"
    )


def _module(name: str) -> ModuleType | None:
    """None where there is no such module; what a module lacks in its turn is its own error."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as missing:
        if f"{name}.".startswith(f"{missing.name}."):
            return None
        raise UserError(f"config.method: module {name!r} cannot be imported: {missing}") from None
