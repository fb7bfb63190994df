"""The steps of a run: batches in, state out, numbers written one step late."""

import dataclasses
import signal
import time
from collections.abc import Callable, Mapping

import jax
import numpy as np
from jaxtyping import Array

from latent_jax.data import pipeline
from latent_jax.errors import UserError
from latent_jax.models.qwen2_5_vl import flops
from latent_jax.runtime import hosts, preemption, tracing
from latent_jax.runtime.checkpoints import Checkpoints
from latent_jax.runtime.metrics import Metrics
from latent_jax.runtime.progress import Progress
from latent_jax.training.resume import save
from latent_jax.training.state import Setup, TrainState


def loop(
    setup: Setup,
    state: TrainState,
    step: Callable[[TrainState, Mapping[str, Array]], tuple[TrainState, dict[str, Array]]],
    validate: Callable[[TrainState], dict[str, float]] | None,
    batches: pipeline.BatchIterator,
    checkpoints: Checkpoints,
    metrics: Metrics,
    progress: Progress,
    trace: tracing.Tracing,
    asked_to_stop: preemption.Asked,
) -> tuple[TrainState, int]:
    """Runs the steps that are left. Returns (state, the signal that ended it early or 0)."""
    config = setup.config
    device_kind = setup.mesh.devices.flat[0].device_kind
    ledger = setup.ledger(device_kind, setup.mesh.size)
    pending, done = None, int(state.step)
    ended = time.monotonic()

    def report(pending: tuple) -> tuple[dict, bool]:
        """Fetches a finished step's numbers: one step late, so that the device never waits for the host.

        Returns where the data of all hosts stood, and whether one of them was asked to stop.
        """
        nonlocal ended
        number, found, counts, channels, waited, data, held_out = pending
        values = {name: float(value) for name, value in jax.device_get(found).items()}
        counts = {name: int(value) if name != "pairs" else value for name, value in counts().items()}
        examples, blank, asked = (counts.pop(name) for name in ("examples", "blank", "asked"))
        data = {**data, "blank": blank}
        pipeline.check_broken(data, config.data.max_bad)
        now = time.monotonic()
        seconds, ended = now - ended, now
        work = flops.Work(**counts, channels=channels)
        values = (
            {"examples": examples, "skipped": data["skipped"] + blank}
            | values
            | {
                "tokens_per_second": work.tokens / seconds,
                **ledger.utilisation(work, seconds),
                "step_seconds": seconds,
                "data_wait_seconds": waited,
            }
            | held_out
        )
        if metrics.due(number) or held_out:
            metrics.write(number, values)
        progress.update(number, values)
        check_finite(number, values)
        return data, bool(asked)

    while done < config.train.steps:
        began = time.monotonic()
        batch = next(batches)
        waited = time.monotonic() - began
        trace.before(done + 1)
        state, found = step(state, hosts.place(batch, setup.mesh, config.data.groups))
        stop = False
        if pending:
            _, stop = report(pending)
        done += 1
        trace.after(done, found)
        work, data = flops.count(batch), batches.get_state()
        counts = {"examples": int(batch["example_mask"].sum()), "blank": data["blank"], "asked": asked_to_stop()}
        counts |= {name: value for name, value in dataclasses.asdict(work).items() if name != "channels"}
        held_out = {}
        if validate and done % config.evaluate.every == 0:
            jax.block_until_ready(found)
            began = time.monotonic()
            held_out = validate(state)
            ended += time.monotonic() - began  # no part of the step's own time
        pending = (done, found, hosts.summed(counts), work.channels, waited, data, held_out)
        # Many hosts stop at the same step: the first at which all know that one was asked.
        last, stop = done == config.train.steps, stop or (bool(counts["asked"]) and jax.process_count() == 1)
        if last or stop or checkpoints.due(done):
            # The lines up to a checkpoint stand before it does: a kill in between must not lose any.
            data, asked = report(pending)
            pending, stop = None, stop or asked
            save(checkpoints, state, data, {"metrics": metrics.checksum()})
        if stop and not last:
            checkpoints.wait()
            progress.say(f"stopped after step {done}; the same command goes on from there")
            # A host that only heard of it takes the signal that schedulers send.
            return state, asked_to_stop.number or signal.SIGTERM
    return state, 0


def check_finite(step: int, values: dict[str, float]) -> None:
    """Raises UserError where a step's loss or gradient is not finite."""
    for name, words in (("loss/total", "loss"), ("grad_norm", "norm of the gradient")):
        if not np.isfinite(values.get(name, 0.0)):
            raise UserError(
                f"step {step}: the {words} is {values[name]}; the checkpoints before it are whole. "
                f"Expected a finite {words}: try a lower config.train.learning_rate or config.train.clip"
            )
