"""Compiles a config's training step for a machine that is not there, and reads off what it takes.

Nothing but shapes: no weights, tokenizer, dataset or hub. The caller has prepared the environment
(`topologies.start`) before jax was used.
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from latent_jax import methods
from latent_jax.assets import TINY_VL
from latent_jax.config.training import PRESETS, Config
from latent_jax.errors import UserError
from latent_jax.methods.contract import Method
from latent_jax.models import hf_io
from latent_jax.models.parameters import Structure
from latent_jax.models.qwen2_5_vl.config import ModelConfig, from_json
from latent_jax.ops import attention
from latent_jax.perf import hlo, topologies
from latent_jax.perf.planned_batch import Planned, abstract_batch, image_spec, planned
from latent_jax.perf.roofline import Roofline, roofline
from latent_jax.runtime import sharding
from latent_jax.training import resolve
from latent_jax.training.state import Setup, make_setup, new_model
from latent_jax.training.step import make_step


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one config's step takes on one topology. Sizes are bytes of one device.

    arguments: by what they are. temporaries, peak: the compiler's; peak is None where it refused without a number.
    remat: what was compiled, `auto` resolved. refused: the compiler's own out-of-memory line, or "". compiled: what
    could be read from the program, None where refused.
    """

    config: Config
    topology: topologies.Topology
    mesh: dict[str, int]
    remat: str
    batches: Planned
    attention: attention.Choice
    arguments: dict[str, int]
    model_flops: tuple[float, float]
    temporaries: int | None
    peak: int | None
    memory: int
    refused: str
    compiled: "Compiled | None"

    @property
    def fits(self) -> bool:
        return not self.refused and self.peak is not None and self.peak <= self.memory


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the program does in a step, on one device. donated: bytes of arguments that results are written over."""

    donated: int
    flops: float
    traffic: float
    collectives: list[hlo.Collective]
    roofline: Roofline


def plan(config: Config, topology: topologies.Topology) -> Plan:
    """Compiles the step. Raises UserError where the config cannot be planned at all."""
    devices = topologies.open_devices(topology)
    setup, batches = prepare(config, devices)
    state, batch = setup.abstract(), abstract_batch(batches.batch_shape, setup)
    arguments = {
        "parameters": _size(state.trainable),
        "optimiser": _size(state.opt_state),
        "frozen": _size(state.frozen),
        "batch": _size(batch),
    }
    ledger = setup.ledger(topology.chip.kind, topology.devices)
    about = functools.partial(
        Plan, config=config, topology=topology, mesh=dict(setup.mesh.shape), remat=setup.config.model.remat,
        batches=batches, attention=setup.attention, arguments=arguments, model_flops=ledger.flops(batches.work),
    )  # fmt: skip
    try:
        compiled = make_step(setup).lower(state, batch).compile()
    except jax.errors.JaxRuntimeError as problem:
        refused, temporaries, memory = out_of_memory(str(problem), topology, sum(arguments.values()))
        peak = None if temporaries is None else temporaries + sum(arguments.values())
        return about(temporaries=temporaries, peak=peak, memory=memory, refused=refused, compiled=None)
    sizes = compiled.memory_analysis()
    program = hlo.Program(compiled.as_text())
    total, traffic, moved = hlo.total_flops(program), hlo.traffic(program), hlo.collectives(program)
    # What aliases an argument is no more memory; donated arrays are updated in place.
    everything = sizes.argument_size_in_bytes + sizes.temp_size_in_bytes
    everything += sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return about(
        temporaries=sizes.temp_size_in_bytes,
        peak=getattr(sizes, "peak_memory_in_bytes", 0) or everything,
        memory=topology.memory,
        refused="",
        compiled=Compiled(sizes.alias_size_in_bytes, total, traffic, moved, roofline(topology, total, traffic, moved)),
    )


def prepare(config: Config, devices: list) -> tuple[Setup, Planned]:
    """The run's setup on these devices, by the functions that training calls, and the batches it is planned for."""
    method = methods.find(config.method)
    shape, directory = model_shape(config)
    mesh = sharding.make_mesh(config.mesh.replica, config.mesh.fsdp, config.mesh.tp, devices)
    batch = planned(config, method, shape, directory, sharding.data_shards(mesh))
    config = resolve.resolved(config, batch.batch_shape, mesh.devices.flat[0].platform)
    dtypes = resolve.stored_dtypes(config, directory, shape) if directory else _stated_dtypes(config, method, shape)
    return make_setup(config, method, shape, mesh, dtypes), batch


def model_shape(config: Config) -> tuple[ModelConfig, Path | None]:
    """(shape, directory): of a checkpoint on this machine, or of a shipped preset, which has no directory."""
    model = config.model
    directory = Path(model.path) if model.path else TINY_VL
    if (directory / "config.json").exists() and not (model.init == "random" and model.preset):
        directory = hf_io.resolve(directory)
        shape, image = from_json(resolve.shape_file(config, directory)), image_spec(config, directory)
        return resolve.model_config(shape, image) if image else shape, directory
    if not model.preset:
        raise UserError(
            f"config.model.path: {model.path!r} is not on this machine and plan downloads nothing; "
            "set config.model.preset to a published shape"
        )
    return from_json(PRESETS / f"{model.preset}.json"), None


def _stated_dtypes(config: Config, method: Method, shape: ModelConfig) -> dict[str, np.dtype]:
    """As `resolve.stored_dtypes`, for a published checkpoint that is not here: all of the dtype that it states."""
    if config.model.init == "random":
        return {}
    stated = json.loads((PRESETS / f"{config.model.preset}.json").read_text()).get("torch_dtype", "bfloat16")
    structure = Structure.of(nnx.eval_shape(lambda: new_model(config, method, shape)))
    return {path: jnp.dtype(stated) for path in structure.variables if path.startswith("vlm.")}


# How the compilers put it: all that is used of what there is, or the temporaries alone.
_USED = re.compile(r"[Uu]sed ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?)")
_TEMPORARIES = re.compile(r"temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)")


def out_of_memory(message: str, topology: topologies.Topology, arguments: int) -> tuple[str, int | None, int]:
    """(the refusal in a line, bytes of temporaries that it asks for or None, bytes of memory that it says are there).

    `arguments`: bytes of the step's arguments. Raises UserError for any other failure of the compiler: its first line.
    """
    line = " ".join(message.split("\n")[0].split())
    if "RESOURCE_EXHAUSTED" not in message and "out of memory" not in message.lower():
        raise UserError(f"--topology={topology.name}: the compiler failed: {line[:300]}")
    unit = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    for pattern, included in ((_TEMPORARIES, 0), (_USED, arguments)):
        if found := pattern.search(message):
            asked, there = (int(float(found[i]) * unit[found[i + 1]]) for i in (1, 3))
            return line, asked - included, there
    return line, None, topology.memory


# ---------------------------------------------------------------- what would make it fit


def alternatives(failed: Plan) -> Iterator[tuple[str, Config, topologies.Topology]]:
    """(what to change, the config, the topology), from the cheapest change to the dearest; none is known to fit yet."""
    config, topology = failed.config, failed.topology
    arguments = sum(failed.arguments.values())
    excess = failed.temporaries / max(failed.memory - arguments, 1) if failed.temporaries else 2.0
    if arguments < failed.memory:
        if config.model.remat not in ("auto", "full"):
            yield "--config.model.remat=full", _with(config, "model", remat="full"), topology
        if failed.mesh["replica"] > 1:
            change = _with(config, "mesh", replica=1, fsdp=-1)
            yield "--config.mesh.replica=1 --config.mesh.fsdp=-1", change, topology
        # What the config names is as large in any number of micro-steps.
        for times in [] if config.data.tokens or config.data.patches else _powers(excess):
            accumulate = config.train.accumulate * times
            if failed.batches.batch_shape.examples % times == 0:
                yield f"--config.train.accumulate={accumulate}", _with(config, "train", accumulate=accumulate), topology
        if failed.batches.batch_shape.tokens > 1024:
            shorter = failed.batches.batch_shape.tokens // 2
            words = f"--config.data.rows={failed.batches.batch_shape.rows} --config.data.tokens={shorter}"
            yield words, _with(config, "data", rows=failed.batches.batch_shape.rows, tokens=shorter), topology
    for times in _powers(arguments / (0.6 * failed.memory)):
        larger = topology.times(times)
        yield f"--topology={larger.name}", config, larger


def _with(config: Config, section: str, **changes: object) -> Config:
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **changes)})


def _powers(least: float) -> list[int]:
    """Three powers of two from the first that is at least `least`, and 2."""
    first = max(1, math.ceil(math.log2(max(least, 1.001))))
    return [2 ** (first + more) for more in range(3)]


def _size(tree: object) -> int:
    """Bytes of one device's shards."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
