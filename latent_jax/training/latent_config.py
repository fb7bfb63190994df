"""The files of a method beside a Hugging Face checkpoint: the tensors of its head, its name and its settings.

`latent_config.json` is {"method": NAME, SECTION: {...}, ...} with every section that the method declares, so that the
method itself rebuilds what it made. Earlier versions wrote the section `latent` of pretraining alone, without a name.
"""

import typing
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from latent_jax import methods
from latent_jax.config import schema
from latent_jax.config.training import Config
from latent_jax.errors import UserError
from latent_jax.methods.contract import Method
from latent_jax.models import hf_export
from latent_jax.models.hf_io import LATENT_CONFIG
from latent_jax.models.parameters import Structure
from latent_jax.models.qwen2_5_vl.config import ModelConfig
from latent_jax.runtime.command import say_line
from latent_jax.training.state import Arrays, Setup

T = typing.TypeVar("T")  # an array, wherever it is


def beside(config: Config, head: Mapping[str, T]) -> tuple[Mapping[str, T], dict] | None:
    """The tensors of the head (which may be none) and the document, both saved beside the weights of an export; None
    for a method that leaves nothing for inference."""
    method = methods.find(config.method)
    return (head, document(config)) if head or method.think or method.span else None


def document(config: Config) -> dict:
    """The latent_config.json of a run's export."""
    sections = methods.find(config.method).sections
    return {"method": config.method} | {name: schema.to_dict(getattr(config, name)) for name in sections}


def settings(found: dict, where: str) -> Config:
    """The config of the method that a latent_config.json names: its sections as they stand there, all else by default.

    Raises UserError naming a section or key that is unknown or wrong; `where`: the file.
    """
    if "method" not in found:
        found = {"method": "pretrain", "latent": found}
    try:
        method = methods.find(found["method"])
        if unknown := sorted(found.keys() - method.sections.keys() - {"method"}):
            raise UserError(f"config.{unknown[0]:.80}: no section of method {found['method']!r}")
        made = schema.resolve({**schema.to_dict(schema.schema(found["method"])()), **found})
        return typing.cast(Config, made)  # of a method: never an evaluation's
    except UserError as problem:
        raise UserError(f"{where}: {str(problem).removeprefix('config.')}") from None


def check_settings(saved: Config, wanted: Config, method: Method, where: str) -> None:
    """Raises UserError where a saved head was trained to read or predict something else than this run asks of it."""
    for key in method.head_settings:
        section, name = key.split(".")
        before, now = (getattr(getattr(config, section), name) for config in (saved, wanted))
        if before != now:
            raise UserError(f"{where}: the head has {key} {before!r}, but config.{key} is {now!r}; expected the same")


def head(method: Method, arrays: Mapping[str, T]) -> dict[str, T]:
    """Of a head's arrays (paths without `head.`), those that inference needs."""
    return {path: array for path, array in arrays.items() if method.exported(path)}


def saved_head(setup: Setup, directory: str | Path) -> Arrays:
    """The head beside the HF checkpoint that a run starts from, where its method has one and takes up that one's.

    Raises UserError where it has another shape or other settings than this run's: a silently new head would look like
    a trained one. One of another method is left, and that is said.
    """
    config = setup.config
    saved = hf_export.load_latent(directory) if config.model.init == "checkpoint" else None
    paths = {path.removeprefix("head."): path for path in setup.structure.variables if path.startswith("head.")}
    if saved is None:
        return {}
    tensors, found = saved
    where = Path(directory) / LATENT_CONFIG
    if not paths:
        if tensors:
            _say(f"{directory}: its latent head is dropped; method {config.method} has none")
        return {}
    made = settings(found, str(where))
    if made.method not in (config.method, *setup.method.heads):
        if tensors:
            _say(f"{directory}: its head is of method {made.method}; that of {config.method} starts anew")
        return {}
    wanted = {n: path for n, path in paths.items() if setup.method.exported(n) and path not in setup.frozen}
    for name, path in wanted.items():
        tensor = tensors.get(name)
        if tensor is None or tensor.shape != setup.structure.shape(path):
            got = "missing" if tensor is None else f"of shape {tensor.shape}"
            raise UserError(
                f"{directory}: the latent head's {name} is {got}, expected shape {setup.structure.shape(path)}; set "
                "config.* to the settings of the saved latent_config.json"
            )
    check_settings(made, config, setup.method, str(where))
    return {path: jax.device_put(tensors[name], setup.sharding(path)) for name, path in wanted.items()}


def rebuild(
    tensors: Mapping[str, np.ndarray | jax.Array],
    config: Config,
    model_config: ModelConfig,
    where: str | Path,
    dtype: DTypeLike | None,
) -> nnx.Module | None:
    """The method's head around loaded tensors, its weights in `dtype`, its statistics fp32, frozen networks as stored.

    Returns None where the method has none. Raises UserError naming a tensor that is missing, unknown, not finite or not
    of the shape that the method asks for.
    """
    method = methods.find(config.method)
    made = nnx.eval_shape(lambda: method.build_head(model_config, config, nnx.Rngs(0)))
    if made is not None:
        for path in list(Structure.of(made).variables):
            if not method.exported(path):
                _remove(made, path.split("."))
    structure = Structure.of(made if made is not None else nnx.Module())
    expected = structure.variables
    if expected and not tensors:
        raise UserError(f"{where}: no such file, but the method {config.method!r} of {LATENT_CONFIG} has a head")
    for name in sorted(expected.keys() ^ tensors.keys()):
        what = "missing" if name in expected else f"none of the head of method {config.method!r}"
        raise UserError(f"{where}: tensor '{name}' is {what}")
    for name, tensor in tensors.items():
        shape, floats = np.shape(tensor), jnp.issubdtype(tensor.dtype, jnp.floating)
        if shape != structure.shape(name) or not floats:
            wanted = f"{structure.shape(name)} of floats"
            raise UserError(f"{where}: tensor '{name}' is {tensor.dtype} {shape}, expected {wanted}")
        if not np.isfinite(np.asarray(tensor)).all():
            raise UserError(f"{where}: tensor '{name}' has values that are not finite")
    if not tensors:
        return None
    kinds = {path: dtype if structure.trained(path) else jnp.float32 for path in expected}
    kinds |= {path: tensors[path].dtype for path in expected if f"head.{path}" in method.frozen(config)}
    return structure.build({path: jnp.asarray(np.asarray(tensors[path]), kinds[path]) for path in expected})


def _remove(module: nnx.Module, path: list[str]) -> None:
    for name in path[:-1]:
        module = getattr(module, name)
    delattr(module, path[-1])


def _say(line: str) -> None:
    if jax.process_index() == 0:
        say_line(line)
