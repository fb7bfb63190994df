"""What a run decides once, from its data and its machine, and keeps in config.json: the batch's static shapes."""

import dataclasses
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from latent_jax.config import schema
from latent_jax.config.training import Config, mixture
from latent_jax.data import batch_shapes, packing, pipeline, sources
from latent_jax.data.chat import Processor
from latent_jax.data.layout import Example
from latent_jax.errors import UserError
from latent_jax.methods.contract import Method
from latent_jax.models import hf_export
from latent_jax.models.qwen2_5_vl.config import ModelConfig
from latent_jax.runtime import files, hosts, provenance, sharding
from latent_jax.training import resolve, workdir

Sources = Sequence[tuple[pipeline.Source, float]]  # with their sampling weights
_NO_INPUT = {"generation_config.json"}  # of the small files, what no trained number depends on


def settle(
    config: Config,
    directory: Path,
    method: Method,
    processor: Processor,
    model_config: ModelConfig,
    data: Sources,
    mesh: jax.sharding.Mesh,
    origin: Path,
) -> tuple[Config, packing.BatchShape, list[str]]:
    """Decides once what depends on the data and the machine, and keeps it in the workdir's config.json.

    Returns (config with nothing left open, the batch's BatchShape, lines worth saying). A workdir that was begun before
    keeps its decisions; raises UserError where the config that comes now would change trained numbers.
    """
    file, shards = directory / workdir.CONFIG, sharding.data_shards(mesh)
    notes: list[str] = []
    measured: dict = {}
    if begun := file.exists():
        old, measured = schema.read(file)
        notes = schema.check_resume(old, config)
        if "budgets" not in measured:
            raise UserError(f"{directory}: was begun by another program ({', '.join(measured)}); use a new --workdir")
        notes += provenance.changes(schema.read_all(file))
    now_from = made_from(config, origin)
    hosts.agree("data", now_from)
    if begun:
        check_same(measured.get("made_from", {}), now_from, directory)
    else:
        chosen, notes = _choose_budgets(config, method, processor, model_config, data, shards)
        measured = {"budgets": dataclasses.asdict(chosen), "run": secrets.token_hex(8)}
    measured["made_from"] = now_from
    try:
        # The room of an example is the method's to say; workdirs of old do not hold all of it.
        batch_shape = packing.BatchShape(**measured["budgets"]).with_room(method.room(config))
    except TypeError as problem:
        raise UserError(f"{file}: measured.budgets: {problem}; it was begun by another version") from None
    resolve.check_groups(batch_shape, shards)
    before, now = measured.get("mesh"), dict(mesh.shape)
    if before not in (None, now):
        notes.append(
            f"the mesh changes from {mesh_words(before)} to {mesh_words(now)}: the same data in the same order, but "
            "sums are added in another order, so that losses agree to rounding and not to the bit"
        )
    hosts.sync("every host has read config.json")
    if hosts.primary():
        directory.mkdir(parents=True, exist_ok=True)
        schema.write(config, file, {**measured, "mesh": now})
    hosts.sync("the first host has written config.json")
    hosts.expect_shared(file)
    return resolve.resolved(config, batch_shape, mesh.devices.flat[0].platform), batch_shape, notes


def _choose_budgets(
    config: Config, method: Method, processor: Processor, model_config: ModelConfig, data: Sources, shards: int
) -> tuple[packing.BatchShape, list[str]]:
    """Static shapes from a sample of lengths, each source in its share; a size that the config names is kept.

    Returns (BatchShape, lines worth saying).
    """
    sample: list[Example] = []
    notes: list[str] = []
    for source, weight in data:
        count = max(1, round(config.data.sample * weight))
        sample += pipeline.sample_examples(source, layout_of(method, config, processor), processor, count)
    if len(data) > 1:  # sources alternate in the data order; a seeded shuffle stands for that
        np.random.default_rng(config.seed).shuffle(sample)
    if not config.data.tokens:
        count, row = len(sample), config.data.row_tokens
        sample, long = batch_shapes.without_outliers(sample, row, config.data.max_bad)
        if long:
            notes = [
                f"{len(long)} of {count} sampled records are longer than a row may be ({row} tokens, "
                f"config.data.row_tokens; the longest, {long[0].key!r}, has {len(long[0].tokens)}): such records are "
                f"skipped and counted; rows of --config.data.tokens={len(long[0].tokens)} would take them in"
            ]
    memory = jax.process_count() * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    batch_shape = resolve.choose(sample, config, method, model_config.vision, shards, memory)
    if batch_shape.target_slots and method.targets:  # of all targets, whatever the sampled records have
        batch_shape = dataclasses.replace(batch_shape, target_slots=method.targets.shape(model_config, config)[0])
    return batch_shape, notes


def made_from(config: Config, origin: Path) -> dict[str, str]:
    """What trained numbers depend on beside the config, in short: the records, and the files that lay them out."""
    names = [name for name, _ in mixture(config.data.name)]
    found = {
        f"the records of {name} in {config.data.path or 'the cache'}": sources.fingerprint(
            name, config.data.path, config.data.split
        )
        for name in names
    }
    for name in hf_export.SMALL_FILES:
        if name not in _NO_INPUT and (origin / name).is_file():
            found[f"{name} of the model"] = files.checksum(files.read_bytes(origin / name))
    return found


def check_same(before: Mapping[str, str], now: Mapping[str, str], directory: Path) -> None:
    """Raises UserError where something that trained numbers depend on is another than when the run began."""
    changed = [name for name in before if before[name] != now.get(name)]
    if changed:
        raise UserError(
            f"{directory}: was begun with other data: {', '.join(changed)} {'has' if len(changed) == 1 else 'have'} "
            "changed since; bring the old back, or use a new --workdir"
        )


def layout_of(method: Method, config: Config, processor: Processor) -> pipeline.LayoutFn:
    """What the method shows of (record, its index in the data order)."""
    return lambda record, index: method.layout(record, index, config, processor)


def mesh_words(shape: Mapping[str, int]) -> str:
    """`2x4x1` of a mesh's axes."""
    return "x".join(str(size) for size in shape.values())
