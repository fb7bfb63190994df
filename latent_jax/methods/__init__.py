"""Training methods, one file each: what the model sees (host) and what it is scored on (device).

A module is a method where it has a `METHOD`; `find` looks in this package first, and then for any module of the name.
"""

import functools
import importlib
import pkgutil

from latent_jax.errors import UserError
from latent_jax.methods import own
from latent_jax.methods.contract import Method


def names() -> list[str]:
    """The methods of this package."""
    found = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return [name for name in found if hasattr(importlib.import_module(f"{__name__}.{name}"), "METHOD")]


@functools.cache
def find(name: str) -> Method:
    """The method of a name: a module of this package, or one of your own that Python finds (`my_package.my_method`).

    Raises UserError where there is none. What its own code raises later is a UserError too (own.py).
    """
    other = ""
    if isinstance(name, str) and all(part.isidentifier() for part in name.split(".")):
        for full in (f"{__name__}.{name}", name):
            module = own.load(full)
            method = getattr(module, "METHOD", None)
            if module and isinstance(method, Method):
                return method if module.__name__.startswith(f"{__name__}.") else own.guarded(method, module)
            if method is not None:
                other = f"; the METHOD of {full} is {method!r:.100}, expected a Method(...)"
    raise UserError(
        f"config.method: got {name!r:.100}, expected one of {', '.join(names())}, or a module of your own with a METHOD"
        + other
    )
