"""Compiles a config's training step for a machine that is not there, and reads off what it takes.

Nothing but shapes: no weights, tokenizer, dataset or hub. The caller has prepared the environment
(`topologies.start`) before jax was used.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from latent_jax import methods
from latent_jax.assets import TINY_VL
from latent_jax.config.training import PRESETS, named_sizes
from latent_jax.data import batch_shapes, packing
from latent_jax.data.layout import Room
from latent_jax.errors import UserError
from latent_jax.models import hf_io
from latent_jax.models.parameters import Structure
from latent_jax.models.qwen2_5_vl import flops
from latent_jax.models.qwen2_5_vl.config import ModelConfig, from_json
from latent_jax.ops import attention
from latent_jax.perf import hlo, topologies
from latent_jax.perf.roofline import Roofline, roofline
from latent_jax.runtime import sharding
from latent_jax.training.state import Setup, make_setup, new_model
from latent_jax.training.step import make_step

# Words beside an example's image or slots, where no data is at hand to measure: a long caption, a question's turn.
TEXT_TOKENS = 64


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one config's step takes on one topology. Sizes are bytes of one device.

    arguments: by what they are. temporaries, peak: the compiler's; peak is None where it refused without a number.
    refused: its own out-of-memory line, or "". compiled: what could be read from the program, None where refused.
    """

    config: object
    topology: topologies.Topology
    mesh: dict[str, int]
    batch_shape: packing.BatchShape
    work: flops.Work
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


def plan(config, topology: topologies.Topology) -> Plan:
    """Compiles the step. Raises UserError where the config cannot be planned at all."""
    devices = topologies.open_devices(topology)
    setup, batch_shape, work = prepare(config, devices)
    state, batch = setup.abstract(), abstract_batch(batch_shape, setup)
    arguments = {
        "parameters": _size(state.trainable),
        "optimiser": _size(state.opt_state),
        "frozen": _size(state.frozen),
        "batch": _size(batch),
    }
    ledger = setup.ledger(topology.chip.kind, topology.devices)
    about = dict(
        config=config, topology=topology, mesh=dict(setup.mesh.shape), batch_shape=batch_shape, work=work,
        attention=setup.attention,
        arguments=arguments, model_flops=ledger.flops(work),
    )  # fmt: skip
    try:
        compiled = make_step(setup).lower(state, batch).compile()
    except jax.errors.JaxRuntimeError as problem:
        refused, temporaries, memory = out_of_memory(str(problem), topology, sum(arguments.values()))
        peak = None if temporaries is None else temporaries + sum(arguments.values())
        return Plan(**about, temporaries=temporaries, peak=peak, memory=memory, refused=refused, compiled=None)
    sizes = compiled.memory_analysis()
    program = hlo.Program(compiled.as_text())
    total, traffic, moved = hlo.total_flops(program), hlo.traffic(program), hlo.collectives(program)
    # What aliases an argument is no more memory; donated arrays are updated in place.
    everything = sizes.argument_size_in_bytes + sizes.temp_size_in_bytes
    everything += sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return Plan(
        **about,
        temporaries=sizes.temp_size_in_bytes,
        peak=getattr(sizes, "peak_memory_in_bytes", 0) or everything,
        memory=topology.memory,
        refused="",
        compiled=Compiled(sizes.alias_size_in_bytes, total, traffic, moved, roofline(topology, total, traffic, moved)),
    )


def prepare(config, devices: list) -> tuple[Setup, packing.BatchShape, flops.Work]:
    """The run's setup on these devices, the shape of its batches, and the work that such a batch is."""
    method = methods.find(config.method)
    model_config, stored, max_pixels = model_shape(config)
    mesh = sharding.make_mesh(config.mesh.replica, config.mesh.fsdp, config.mesh.tp, devices)
    sharding.check_heads(mesh, model_config.text.num_attention_heads)
    batch_shape, work = typical_batch(config, method.room(config), model_config, max_pixels, sharding.data_shards(mesh))
    chosen = {name: getattr(batch_shape, name) for name in ("groups", "rows", "tokens", "patches", "image_patches")}
    remat = "full" if config.model.remat == "auto" else config.model.remat
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, **chosen),
        model=dataclasses.replace(config.model, remat=remat),
    )
    dtypes = {}
    if config.model.init == "checkpoint":
        structure = Structure.of(nnx.eval_shape(lambda: new_model(config, method, model_config)))
        dtypes = {path: stored for path in structure.variables if path.startswith("vlm.")}
    return make_setup(config, method, model_config, mesh, dtypes), batch_shape, work


def model_shape(config) -> tuple[ModelConfig, jnp.dtype, int]:
    """(shape, the checkpoint's dtype, its processor's max_pixels or 0): of a local checkpoint or a shipped preset."""
    model = config.model
    directory = Path(model.path) if model.path else TINY_VL
    if (directory / "config.json").exists() and not (model.init == "random" and model.preset):
        directory = hf_io.resolve(directory)
        file, processor = directory / "config.json", directory / "preprocessor_config.json"
        pixels = json.loads(processor.read_text()).get("max_pixels", 0) if processor.exists() else 0
        shape = from_json(file)
        weights = hf_io.Checkpoint.open(directory).weights(shape) if model.init == "checkpoint" else {}
        dtypes = {weight.dtype for weight in weights.values()}
        return shape, jnp.dtype(dtypes.pop()) if len(dtypes) == 1 else jnp.dtype(jnp.bfloat16), pixels
    if not model.preset:
        raise UserError(
            f"config.model.path: {model.path!r} is not on this machine and plan downloads nothing; "
            "set config.model.preset to a published shape"
        )
    file = PRESETS / f"{model.preset}.json"
    return from_json(file), jnp.dtype(json.loads(file.read_text()).get("torch_dtype", "bfloat16")), 0


def typical_batch(
    config, room: Room, model_config: ModelConfig, max_pixels: int, shards: int
) -> tuple[packing.BatchShape, flops.Work]:
    """The shape that training would choose if every example held one image of data.max_pixels and TEXT_TOKENS words.

    Where neither config nor checkpoint bounds an image, it takes half a row. Sizes that the config names are kept.
    Also the model's own work on a step of such batches, all rows full.
    """
    vision, data = model_config.vision, config.data
    pixels = data.max_pixels or max_pixels
    merged = pixels // (vision.patch_size * vision.spatial_merge_size) ** 2
    merged = min(merged or data.row_tokens // 2, data.row_tokens // 2)
    image = merged * vision.merge_unit
    size = packing.Size(
        tokens=max(merged, room.slots) + TEXT_TOKENS,
        patches=image,
        slots=room.slots,
        channels=vision.in_channels * vision.patch_size**2,
        image_patches=image,
    )
    batch_shape = batch_shapes.choose(
        [size],
        batch_size=config.train.batch_size,
        groups=data.groups or shards,
        micro=config.train.accumulate,
        window_patches=vision.window_patches,
        merge_unit=vision.merge_unit,
        row_tokens=data.row_tokens,
        room=room,
        named=named_sizes(data),
    )
    if batch_shape.groups % shards:
        raise UserError(
            f"config.data.groups: {batch_shape.groups} groups cannot be shared by {shards} data shards "
            "(config.mesh.replica x config.mesh.fsdp); expected a multiple"
        )
    groups = batch_shape.micro * batch_shape.groups
    tokens, patches = groups * batch_shape.rows * batch_shape.tokens, groups * batch_shape.patches
    length = min(size.tokens, batch_shape.tokens)
    work = flops.Work(
        tokens=tokens,
        supervised=tokens * TEXT_TOKENS // size.tokens,
        pairs=tokens * length / 2,
        patches=patches,
        window_pairs=patches * vision.window_patches,
        image_pairs=patches * image,
        channels=batch_shape.channels,
    )
    return batch_shape, work


def abstract_batch(batch_shape: packing.BatchShape, setup: Setup) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch's shapes, dtypes and shardings."""
    place = sharding.batch_sharding(setup.mesh)
    return {
        name: jax.ShapeDtypeStruct((batch_shape.micro, batch_shape.groups, *shape), dtype, sharding=place)
        for name, (shape, dtype) in packing.shapes(batch_shape).items()
    }


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


def alternatives(failed: Plan) -> Iterator[tuple[str, object, topologies.Topology]]:
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
            if failed.batch_shape.examples % times == 0:
                yield f"--config.train.accumulate={accumulate}", _with(config, "train", accumulate=accumulate), topology
        if failed.batch_shape.tokens > 1024:
            shorter = failed.batch_shape.tokens // 2
            words = f"--config.data.rows={failed.batch_shape.rows} --config.data.tokens={shorter}"
            yield words, _with(config, "data", rows=failed.batch_shape.rows, tokens=shorter), topology
    for times in _powers(arguments / (0.6 * failed.memory)):
        larger = topology.times(times)
        yield f"--topology={larger.name}", config, larger


def _with(config, section: str, **changes):
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **changes)})


def _powers(least: float) -> list[int]:
    """Three powers of two from the first that is at least `least`, and 2."""
    first = max(1, math.ceil(math.log2(max(least, 1.001))))
    return [2 ** (first + more) for more in range(3)]


def _size(tree) -> int:
    """Bytes of one device's shards."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
