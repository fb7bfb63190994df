"""Training, one story: the model, the data, the state to start from, the step, and the loop."""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from clu import parameter_overview

from latent_jax import methods
from latent_jax.assets import TINY_VL
from latent_jax.config import schema
from latent_jax.config.training import Config, mixture, profiled
from latent_jax.data import packing, pipeline, sources
from latent_jax.data.chat import Processor
from latent_jax.models import hf_export, hf_io
from latent_jax.models.origin import check_origin
from latent_jax.models.qwen2_5_vl.config import from_json
from latent_jax.runtime import files, hosts, lock, preemption, provenance, sharding, tracing
from latent_jax.runtime.checkpoints import Checkpoints
from latent_jax.runtime.devices import divide_cpu, enable_compile_cache, keep_freed_memory
from latent_jax.runtime.metrics import Metrics
from latent_jax.runtime.progress import Progress
from latent_jax.training import resolve, target_cache, validation, workdir
from latent_jax.training.finish import finish, finished, look_ahead
from latent_jax.training.latent_config import saved_head
from latent_jax.training.loop import loop
from latent_jax.training.resume import check_begun, check_start, restore
from latent_jax.training.shapes import layout_of, mesh_words, settle
from latent_jax.training.state import Setup, TrainState, check_frozen, first_state, make_setup
from latent_jax.training.step import make_step


@dataclasses.dataclass(frozen=True)
class Summary:
    """How a run ended: the steps that are done, the signal that stopped it early (0: none did), compiles of the step,
    and what the method's report found on held-out data."""

    step: int
    stopped: int
    compiles: int
    report: dict[str, float]


def run(config: Config, directory: str | Path) -> Summary:
    """Trains what the config describes and leaves everything in `directory`; resumes what lies there already.

    Raises UserError for bad input. SIGTERM and SIGINT, once steps are running, save a checkpoint and return; after the
    last checkpoint they raise Stopped.
    """
    divide_cpu(config.mesh.cpu_devices)
    hosts.agree("config", comparable(config))
    enable_compile_cache()
    with contextlib.ExitStack() as opened:
        if hosts.primary():
            opened.enter_context(lock.only_writer(directory))
        return _run(config, Path(directory), opened)


def _run(config: Config, directory: Path, opened: contextlib.ExitStack) -> Summary:
    method = methods.find(config.method)
    check_begun(config, directory)

    # ------------------------------------------------------------ what is trained
    mesh = sharding.make_mesh(config.mesh.replica, config.mesh.fsdp, config.mesh.tp)
    hosts.meet(mesh)
    if mesh.devices.flat[0].platform == "cpu":
        keep_freed_memory()
    origin = hf_io.resolve(config.model.path or TINY_VL)
    # Before the tokenizer: transformers reads the same config.json, and believes whatever sizes stand there.
    shape = from_json(resolve.shape_file(config, origin))
    processor = Processor.from_directory(origin, config.data.min_pixels or None, config.data.max_pixels or None)
    model_config = resolve.model_config(shape, processor.image)
    sharding.check_heads(mesh, model_config.text.num_attention_heads)
    processor.check_rows(model_config.text.vocab_size, str(config.model.preset or origin))
    # Opens every shard: a broken checkpoint must be an error before a workdir is made for it.
    dtypes = resolve.stored_dtypes(config, origin, model_config)
    if not (directory / workdir.CONFIG).exists():
        check_frozen(config, method, model_config)

    # ------------------------------------------------------------ on what data
    data = open_data(config, config.data.split)
    lacking = look_ahead(config, method, directory)
    held_out = validation.open_records(config) if config.evaluate.every else []
    if config.data.latent_cache:
        cache = target_cache.TargetCache(config, method, processor, model_config, origin, mesh)
        data = list(cache.attach(data, say=_teller(config)))
    config, batch_shape, notes = settle(config, directory, method, processor, model_config, data, mesh, origin)
    notes += lacking
    batches = pipeline.make_dataset(
        data,
        layout_fn=layout_of(method, config, processor),
        processor=processor,
        batch_shape=batch_shape,
        own=hosts.own_groups(mesh, batch_shape.groups),
        seed=config.seed,
        threads=config.data.threads,
        max_broken=config.data.max_bad,
    )

    # ------------------------------------------------------------ from which state
    keep_origin(config, origin, directory)
    setup = make_setup(config, method, model_config, mesh, dtypes)
    # Whatever ends the run, a save that was begun is finished.
    checkpoints = opened.enter_context(
        Checkpoints(
            directory / workdir.CHECKPOINTS,
            config.checkpoint.every,
            config.checkpoint.keep,
            run=schema.read(directory / workdir.CONFIG)[1].get("run"),
        )
    )
    if (done := finished(checkpoints, config, directory)) is not None:
        _teller(config)(f"finished: all {config.train.steps} steps are done; the results lie in {directory}")
        return Summary(config.train.steps, 0, 0, done)
    state, batches_state, extra, told = restore(checkpoints, setup, directory)
    notes += told
    if state is None:
        state = fit(first_state(setup, origin, saved_head(setup, origin)), setup, data, processor, batch_shape)
        check_start(state, config, origin)
        notes += [describe(setup, state)]
    else:
        # Each host counts the broken images that it decodes. After a restore only host 0 keeps the past count, so that
        # the sum over hosts is right.
        batches.set_state(batches_state if hosts.primary() else {**batches_state, "blank": 0})
        notes += [f"resuming after step {int(state.step)}; attention {setup.attention}"]
    primary = hosts.primary()
    if primary:
        files.write_text(directory / workdir.PARAMETERS, overview(state))

    # ------------------------------------------------------------ by which step, for how long
    first = int(state.step)
    with (
        contextlib.closing(batches),
        Metrics(directory, first, config.log.every, config.log.tensorboard, primary, extra.get("metrics")) as metrics,
        Progress(config.train.steps, first, config.log.progress, mute=not primary) as progress,
        tracing.Tracing(profiled(config.log.profile), directory / "profile") as trace,
        preemption.watch() as asked_to_stop,
    ):
        for note in notes:
            progress.say(note)
        step = make_step(setup)
        validate = (
            validation.make_validation(setup, held_out, processor, batch_shape) if config.evaluate.every else None
        )
        state, stopped = loop(
            setup, state, step, validate, batches, checkpoints, metrics, progress, trace, asked_to_stop
        )
        checkpoints.wait()
        report = {} if stopped else finish(setup, state, processor, directory, progress, asked_to_stop)
    return Summary(int(state.step), stopped, step._cache_size(), report)


# ---------------------------------------------------------------- data


def open_data(config: Config, split: str) -> list[tuple[Sequence, float]]:
    """The sources of `config.data.name` with their sampling weights, each cut down to `config.data.share`."""
    found: list[tuple[Sequence[dict], float]]
    found = [(sources.open_source(name, config.data.path, split), w) for name, w in mixture(config.data.name)]
    if config.data.holdout:  # of the first source, which is the one that is reported on
        (source, weight), *others = found
        found = [(sources.hold_out(source, config.data.holdout, config.seed)[0], weight), *others]
    if config.data.share == 1:
        return list(found)
    return [(sources.share(source, config.data.share, config.seed), weight) for source, weight in found]


def comparable(config: Config) -> dict[str, str]:
    """What must be the same on every host, as text: every setting but who is who, and the versions."""
    settings = {f"config.{key}": repr(value) for key, (value, _, _) in schema.leaves(config).items()}
    return {k: v for k, v in settings.items() if not k.startswith("config.hosts.")} | provenance.versions()


def _teller(config: Config) -> Callable[[str], None]:
    """Says a line on standard error where the config asks for progress."""
    shown = config.log.progress and jax.process_index() == 0
    return lambda line: print(line, file=sys.stderr, flush=True) if shown else None


# ---------------------------------------------------------------- state


def keep_origin(config: Config, origin: Path, directory: Path) -> None:
    """Keeps in a new workdir what its exports need of the checkpoint it starts from; of a preset, its shape."""
    kept = directory / workdir.ORIGIN
    if hosts.primary() and kept.exists():
        check_origin(kept)
    elif hosts.primary():
        limits = dict(min_pixels=config.data.min_pixels, max_pixels=config.data.max_pixels)
        hf_export.keep_origin(origin, kept, shape=resolve.shape_file(config, origin), **limits)
    hosts.sync("the first host has kept the origin")


def fit(
    state: TrainState,
    setup: Setup,
    data: Sequence[tuple[pipeline.Source, float]],
    processor: Processor,
    batch_shape: packing.BatchShape,
) -> TrainState:
    """Lets the method measure on the first records what it needs before step one (latent statistics)."""
    statistics, config = setup.method.statistics, setup.config
    if not statistics:
        return state
    source = data[0][0]
    count = min(len(source), statistics.examples(config))
    picked = (source[index * len(source) // count] for index in range(count))
    examples = pipeline.usable(
        picked, lambda record, index: statistics.layout(record, index, config, processor), processor, batch_shape
    )
    model = setup.build(state.trainable, state.frozen)
    values = statistics.measure(model, packing.batches(examples, batch_shape), config)
    placed = {path: jax.device_put(value, setup.sharding(path)) for path, value in values.items()}
    return state._replace(frozen={**state.frozen, **placed})


def describe(setup: Setup, state: TrainState) -> str:
    """One line: how much is trained and frozen, where, in which dtype it computes, and by which attention kernel."""
    trained, frozen = (sum(a.size for a in arrays.values()) for arrays in (state.trainable, state.frozen))
    count = f" on {jax.process_count()} hosts" if jax.process_count() > 1 else ""
    return (
        f"{trained:,} weights trained, {frozen:,} frozen; {setup.dtype.name}; mesh {mesh_words(setup.mesh.shape)} "
        f"(replica x fsdp x tp) of {setup.mesh.devices.flat[0].device_kind}{count}; attention {setup.attention}"
    )


def overview(state: TrainState) -> str:
    """A table of every array: name, shape, dtype, size."""
    arrays = {"trained": state.trainable, "frozen": state.frozen}
    return parameter_overview.get_parameter_overview(arrays, include_stats=False) + "\n"
