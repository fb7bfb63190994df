"""A run's checkpoints: written and read back with the checksums of their arrays and without, gigabytes a second."""

import argparse
import contextlib
import functools
import itertools
import logging
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from latent_jax.models import hf_io
from latent_jax.models.qwen2_5_vl.config import from_json
from latent_jax.perf import models, timing
from latent_jax.perf.timing import Report
from latent_jax.runtime import checksums
from latent_jax.runtime.checkpoints import Checkpoints

WIDTH, LAYERS = 1024, 2  # of the random weights that are taken without --model


def measure(options: argparse.Namespace) -> Report:
    """Times what a training state costs: float32 weights and both of Adam's moments, all of them learning.

    A save is timed until the loop may go on, and until the disk has it; files lie in the page cache all the same.
    """
    logging.getLogger("absl").setLevel(logging.ERROR)  # a save waits for the one before: that is what is measured
    width = options.width or (0 if options.model else WIDTH)
    with (
        models.checkpoint(options.model, width, options.layers or LAYERS) as directory,
        tempfile.TemporaryDirectory(prefix="latent_jax_bench_") as scratch,
    ):
        state = _state(directory)
        if width:
            shutil.rmtree(directory)  # a random one of our own: its room is needed for what is measured
        with contextlib.ExitStack() as opened:
            keep = lambda name: opened.enter_context(Checkpoints(Path(scratch) / name, keep=1))
            return _measure(options, state, {name: keep(name) for name in ("with", "without")})


def _state(directory: Path) -> dict:
    weights = hf_io.load(directory, from_json(directory / "config.json"), dtype=jnp.float32)
    scaled = lambda by: jax.tree.map(lambda array: array * by, weights)
    return {"trainable": weights, "opt_state": {"mu": scaled(0.1), "nu": scaled(0.01)}}


def _measure(options: argparse.Namespace, state: dict, stores: dict[str, Checkpoints]) -> Report:
    size, steps = sum(array.nbytes for array in jax.tree.leaves(state)), itertools.count(1)
    abstract = jax.tree.map(
        lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding), state
    )
    held: dict[str, list[float]] = {name: [] for name in stores}  # seconds until the loop may go on

    def save(name: str) -> None:
        began = time.perf_counter()
        sums = {item: checksums.examined(tree)[0] for item, tree in state.items()} if name == "with" else {}
        stores[name].save(next(steps), state, {}, {}, sums)
        held[name].append(time.perf_counter() - began)
        stores[name].wait()

    def restore(name: str) -> None:
        jax.block_until_ready(stores[name].restore(None, abstract)[0])

    lines, numbers = [], {"bytes": size}
    sides: dict[str, dict[str, Callable[[], object]]] = {"checksums alone": {"with": lambda: checksums.examined(state)}}
    for what, run in (("save", save), ("restore", restore)):
        sides[what] = {name: functools.partial(run, name) for name in stores}
    for what, pair in sides.items():
        if what == "restore":
            state.clear()  # as where a run begins; and half of the memory
        more, numbers[what] = timing.compared("GB", size / 1e9, timing.alternate(pair, options.repeats), ours="with")
        lines += [f"{what}:", *more]
    numbers["held_seconds"] = {name: statistics.median(seconds[1:]) for name, seconds in held.items()}
    lines += [f"a save holds the loop: {', '.join(f'{s:.2f} s {name}' for name, s in numbers['held_seconds'].items())}"]
    return Report(
        f"checkpoint: a state of {size / 1e9:.2f} GB, checksums of its arrays with and without", lines, numbers
    )
