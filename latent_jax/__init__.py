"""Train vision-language models that reason in latent space.

`latent_jax.load(path)` gives a model that speaks, sees and imagines; see latent_jax/inference/vlm.py.
"""

import sys as _sys
import typing as _typing
from collections.abc import Sequence as _Sequence
from pathlib import Path as _Path

if _typing.TYPE_CHECKING:
    from latent_jax.inference.vlm import VLM as _VLM
else:  # jax and transformers only when a model is asked for
    _VLM = _typing.Any

__version__ = "0.1.0"

# `python -m latent_jax.NAME` imports this package first, with -m in the place of the program's name.
if _sys.argv[:1] == ["-m"] and any(word.startswith("latent_jax.") for word in _sys.orig_argv):
    from latent_jax.runtime.command import begin_command as _begin

    _begin()


def load(path: str | _Path = "", dtype: str | None = None, devices: _Sequence[_typing.Any] | None = None) -> _VLM:
    """Loads an HF directory, a hub id, a workdir, or "" for the embedded model: see latent_jax.inference.vlm.load."""
    from latent_jax.inference.vlm import load

    return load(path, dtype, devices)
