"""What is trained and what is frozen: two flat dicts of arrays, made from a checkpoint or at random."""

import dataclasses
import math
import types
from collections.abc import Container, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from latent_jax.config.training import Config
from latent_jax.errors import UserError, os_error
from latent_jax.methods.contract import Loader, Method
from latent_jax.models import hf_io, lora
from latent_jax.models.heads import LatentVLM
from latent_jax.models.parameters import Statistic, Structure
from latent_jax.models.qwen2_5_vl import flops
from latent_jax.models.qwen2_5_vl.config import ModelConfig
from latent_jax.models.qwen2_5_vl.model import Qwen2_5_VL
from latent_jax.ops import attention, partition
from latent_jax.runtime import sharding
from latent_jax.training import optimizer

Arrays = dict[str, jax.Array]


class TrainState(NamedTuple):
    """Everything that a step changes, and the frozen arrays beside it. Keys are dotted paths (`vlm.text.blocks.q`)."""

    step: jax.Array
    trainable: Arrays
    frozen: Arrays
    opt_state: optax.OptState


if TYPE_CHECKING:

    class AbstractState(NamedTuple):
        """The shapes, dtypes and shardings of a TrainState."""

        step: jax.ShapeDtypeStruct
        trainable: dict[str, jax.ShapeDtypeStruct]
        frozen: dict[str, jax.ShapeDtypeStruct]
        opt_state: optax.OptState

else:  # one class to jax, which maps over two trees only where their nodes are of the same class
    AbstractState = TrainState


@dataclasses.dataclass(frozen=True)
class Setup:
    """What one run trains: the model's structure, which paths learn, with which optimiser, and where arrays live."""

    config: Config
    method: Method
    model_config: ModelConfig
    structure: Structure[LatentVLM]
    mesh: Mesh
    transform: optax.GradientTransformation
    dtype: jnp.dtype
    attention: attention.Choice
    frozen: Mapping[str, Loader]

    @property
    def trainable(self) -> list[str]:
        return trained_paths(self.structure, self.config, self.method, self.frozen)

    def ledger(self, device_kind: str, devices: int) -> flops.Ledger:
        """Counts what a step computes, on so many devices of one kind."""
        return flops.Ledger(
            self.model_config,
            device_kind,
            devices,
            passes=self.method.passes(self.config),
            text=_learnt(self.trainable, "vlm.text."),
            vision=_learnt(self.trainable, "vlm.vision.", last="vlm.vision.merger."),
        )

    def sharding(self, path: str) -> NamedSharding:
        return sharding.weight_sharding(self.structure.axes(path), self.structure.shape(path), self.mesh)

    def abstract(self) -> AbstractState:
        """The state's shapes, dtypes and shardings, for compiling and for restoring."""
        wanted = {path: self.abstract_array(path) for path in self.structure.variables}
        trainable = {path: wanted.pop(path) for path in self.trainable}
        shapes = jax.eval_shape(self.transform.init, trainable)
        replicated = sharding.replicated(self.mesh)
        opt_state = optax.tree_map_params(
            self.transform,
            lambda leaf, like: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=like.sharding),
            shapes,
            trainable,
            transform_non_params=lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated),
        )
        step = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)
        return AbstractState(step, trainable, wanted, opt_state)

    def abstract_array(self, path: str) -> jax.ShapeDtypeStruct:
        variable = self.structure.variables[path]
        return jax.ShapeDtypeStruct(variable.shape, variable.dtype, sharding=self.sharding(path))

    def build(self, trainable: Arrays, frozen: Arrays, attention: str = "reference") -> LatentVLM:
        """The model, computing in `dtype`; statistics and scalars stay fp32, the method's frozen networks as they are.

        `attention` is the step's to name, with the mesh that the kernels need; what runs beside it (measuring the data,
        reports) takes rows of any number, and the reference.
        """
        arrays = {**trainable, **frozen}
        weights = {p for p, a in arrays.items() if a.ndim and self.structure.trained(p)} - self.frozen.keys()
        cast = {p: a.astype(self.dtype) if p in weights else a for p, a in arrays.items()}
        # Stacked layers are gathered one at a time by their scan, tables over the vocabulary where they are used.
        at_once = {p for p in cast if self.structure.axes(p)[:1] not in ("L", "V")}
        whole = {p: partition.gather(a, self.structure.axes(p)) if p in at_once else a for p, a in cast.items()}
        model = self.structure.build(whole)
        model.vlm.text.attention = model.vlm.vision.attention = attention
        return model


def trained_paths(structure: Structure[LatentVLM], config: Config, method: Method, frozen: Container[str]) -> list[str]:
    """The paths that are trained. Statistics and the method's frozen networks never are."""
    weights = [path for path in structure.variables if structure.trained(path) and path not in frozen]
    return [path for path in weights if learns(path, config, method)]


def learns(path: str, config: Config, method: Method) -> bool:
    """Whether a weight is trained: as the method says, else by the config's `model` section.

    The method's own head always; of the language model its adapters where there are any, else all of it; the vision
    tower if asked. With adapters, what a method says of a matrix of the language model holds for its adapters.
    """
    if method.learns and config.model.lora_rank and path.startswith("vlm.text."):
        return lora.PART in path and method.learns(lora.adapted(path), config)
    if method.learns:
        return method.learns(path, config)
    if path.startswith("head."):
        return True
    if config.model.lora_rank:
        return lora.PART in path
    return config.model.trainable == "all" or not path.startswith("vlm.vision.")


def _learnt(trainable: list[str], part: str, last: str = " ") -> flops.Learnt:
    """What learns of a part of the model; `last`: where its last layers stand, which no gradient goes beyond."""
    own = [path for path in trainable if path.startswith(part)]
    if not own:
        return "nothing"
    if all(path.startswith(last) for path in own):
        return "merger"
    return "adapters" if all(lora.PART in path for path in own) else "weights"


def make_setup(
    config: Config, method: Method, model_config: ModelConfig, mesh: Mesh, dtypes: dict[str, np.dtype]
) -> Setup:
    """The run's setup. Trainable weights are fp32 masters; frozen ones keep the checkpoint's dtype (`dtypes` by path).

    Raises UserError where the mesh, the attention kernel or the adapters do not fit the model.
    """
    sharding.check_heads(mesh, model_config.text.num_attention_heads)
    lora.check(config.model.lora_rank, model_config.text)
    structure = _structure(config, method, model_config)
    frozen = _loaders(structure, config, method)
    paths = trained_paths(structure, config, method, frozen)
    _check_learns(paths, config)
    kept = {path: dtypes[path] for path in dtypes.keys() & structure.variables.keys() - set(paths)}
    kept |= {path: dtype for path, loader in frozen.items() if (dtype := loader.dtype(dtypes)) is not None}
    for path, dtype in kept.items():
        variable = structure.variables[path]
        structure.variables[path] = variable.replace(jax.ShapeDtypeStruct(variable.shape, dtype))
    transform = optimizer.make(config.train, paths, {path for path in paths if structure.decayed(path)})
    dtype = compute_dtype(config, mesh)
    # By the devices of the mesh, which may be absent ones, never by the machine that builds the program.
    platform = mesh.devices.flat[0].platform
    kernel = choose_attention(config.model.attention, platform, dtype, model_config)
    return Setup(config, method, model_config, structure, mesh, transform, dtype, kernel, frozen)


def _structure(config: Config, method: Method, model_config: ModelConfig) -> Structure[LatentVLM]:
    """The model with the method's head, without arrays. Raises UserError where the head's weights are not declared."""
    structure = Structure.of(nnx.eval_shape(lambda: new_model(config, method, model_config)))
    for path, variable in structure.variables.items():
        known = variable.get_metadata()
        if not path.startswith("head."):
            continue
        trained = structure.trained(path)
        if not trained and not isinstance(variable, Statistic):
            problem = f"is a {type(variable).__name__}; expected weights and statistics"
        elif "axes" not in known or (trained and "decay" not in known):
            problem = "is not made by models.parameters.Declare, which says its axes and its weight decay"
        elif not jnp.issubdtype(variable.dtype, jnp.floating):
            problem = f"is {variable.dtype}, expected floats"
        elif not math.prod(variable.shape):
            problem = f"has shape {variable.shape}, expected at least one value"
        else:
            continue
        raise UserError(f"config.method: {path} of {config.method} {problem}")
    return structure


def _loaders(structure: Structure[LatentVLM], config: Config, method: Method) -> Mapping[str, Loader]:
    """The method's frozen arrays by path."""
    frozen = method.frozen(config)
    if unknown := sorted(path for path in frozen if not path.startswith("head.") or path not in structure.variables):
        raise UserError(f"config.method: Method.frozen of {config.method}: {unknown[0]!r} is no path of its head")
    return frozen


def check_frozen(config: Config, method: Method, model_config: ModelConfig) -> None:
    """Raises UserError where a frozen network could not be loaded; only file headers are read."""
    structure = _structure(config, method, model_config)
    for path, loader in _loaders(structure, config, method).items():
        variable = structure.variables[path]
        loader.check(path, jax.ShapeDtypeStruct(variable.shape, variable.dtype))


def _check_learns(paths: list[str], config: Config) -> None:
    """Raises UserError where nothing learns, or no adapter does of those that the config asks for."""
    if not paths:
        raise UserError(f"config.method: {config.method} trains no weight with these settings; expected at least one")
    if config.model.lora_rank and not any(lora.PART in path for path in paths):
        raise UserError(
            f"config.model.lora_rank: got {config.model.lora_rank}, but method {config.method} trains no matrix of the "
            "language model; expected 0"
        )


def compute_dtype(config: Config, mesh: Mesh) -> np.dtype:
    """The dtype of matmuls: `model.compute_dtype`, or what suits the mesh's devices."""
    named = config.model.compute_dtype
    if named == "auto":
        named = "float32" if mesh.devices.flat[0].platform == "cpu" else "bfloat16"
    return jnp.dtype(named)


def choose_attention(wanted: str, platform: str, dtype: DTypeLike, model_config: ModelConfig) -> attention.Choice:
    """The attention of a step on devices of this platform: `auto` takes what they run fastest.

    Raises UserError where the one that is named cannot run there.
    """
    heads = model_config.text.head_size, model_config.vision.head_size
    if wanted == "auto":
        return attention.choose(platform, dtype, heads)
    if problem := attention.obstacle(wanted, platform, dtype, heads):
        raise UserError(f"config.model.attention: {problem}")
    return attention.Choice(wanted)


def new_model(config: Config, method: Method, model_config: ModelConfig) -> LatentVLM:
    """The model with random weights, fp32, and its adapters where the config asks for them."""
    rngs = nnx.Rngs(config.seed)
    vlm = Qwen2_5_VL(model_config, rngs=rngs)
    head = method.build_head(model_config, config, rngs)
    if config.model.lora_rank:
        # Last, so that everything else starts as it does without.
        vlm.text.blocks.lora = lora.LoRA(vlm.text.blocks, config.model.lora_rank, config.model.lora_alpha, rngs)
    return LatentVLM(vlm, head)


def _loaded(path: str, load: Loader, like: jax.ShapeDtypeStruct, model: Arrays) -> jax.Array:
    """A frozen array of the head. Raises UserError where its loader fails or gives something else than was declared."""
    try:
        found = load(path, like, model)
    except OSError as problem:
        raise UserError(f"config.method: the loader of {path}: {os_error(problem)}") from problem
    if (np.shape(found), found.dtype) != (like.shape, like.dtype):
        raise UserError(
            f"config.method: the loader of {path} gave {found.dtype} {np.shape(found)}, "
            f"expected {like.dtype} {like.shape}"
        )
    return jax.device_put(found, like.sharding)


def first_state(
    setup: Setup, directory: str | Path, head: Mapping[str, jax.Array] = types.MappingProxyType({})
) -> TrainState:
    """The state before the first step: random where the config asks for it, else the checkpoint in `directory`.

    Frozen networks come from their loaders, whatever the checkpoint has. Raises UserError where one cannot be loaded.

    head: arrays that were saved beside the checkpoint (exported.saved_head), by path.
    """
    config, structure = setup.config, setup.structure
    abstract = setup.abstract()
    shardings = {path: a.sharding for path, a in {**abstract.trainable, **abstract.frozen}.items()}
    dtypes = {path: a.dtype for path, a in {**abstract.trainable, **abstract.frozen}.items()}
    loaded: Arrays = {}
    if config.model.init == "checkpoint":
        place = {p.removeprefix("vlm."): s for p, s in shardings.items() if p.startswith("vlm.")}
        types_ = {p.removeprefix("vlm."): d for p, d in dtypes.items() if p.startswith("vlm.")}
        vlm = hf_io.load(directory, setup.model_config, dtype=types_, shardings=place)
        loaded = {f"vlm.{path}": array for path, array in vlm.items()} | dict(head)
    missing = [path for path in structure.variables if path not in loaded and path not in setup.frozen]

    def initialise() -> Arrays:
        arrays = structure.arrays(new_model(config, setup.method, setup.model_config))
        return {path: arrays[path].astype(dtypes[path]) for path in missing}

    fresh = jax.jit(initialise, out_shardings={path: shardings[path] for path in missing})()
    arrays = {**loaded, **fresh}
    arrays |= {path: _loaded(path, load, abstract.frozen[path], arrays) for path, load in setup.frozen.items()}
    trainable = {path: arrays[path] for path in abstract.trainable}
    frozen = {path: arrays[path] for path in abstract.frozen}
    placed = jax.tree.map(lambda a: a.sharding, abstract.opt_state)
    opt_state = jax.jit(setup.transform.init, out_shardings=placed)(trainable)
    return TrainState(jax.device_put(jnp.int32(0), abstract.step.sharding), trainable, frozen, opt_state)
