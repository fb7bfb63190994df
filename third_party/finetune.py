"""Fine-tuning of a stock transformers model on what our own run sees, as our own run does it.

python -m third_party.finetune --config=configs/finetune.py --config.model.path=DIR --workdir=DIR
    [--like=WORKDIR] [--rows=8] [--config.a.b=value ...]

--config   one of method `sft`; data, seed, steps, batch size, optimiser and schedule are read from it as in training
--like     a workdir of ours: each step takes the examples that this run's took, where packing takes what fits
--rows     conversations that go through the model at a time: memory, not numbers
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import torch
import transformers
from absl import flags

from latent_jax import main as command
from latent_jax import train
from latent_jax.assets import TINY_VL
from latent_jax.config import schema
from latent_jax.errors import UserError
from latent_jax.methods import sft
from latent_jax.models.hf_io import resolve
from latent_jax.runtime import preemption
from latent_jax.runtime.command import command as as_command
from latent_jax.runtime.metrics import Metrics
from latent_jax.runtime.progress import Progress
from latent_jax.training import optimizer
from latent_jax.training.workdir import CHECKPOINTS, CONFIG
from third_party.checkpoints import Checkpoints, export
from third_party.families import open_processor
from third_party.model import Tuned
from third_party.processor import Processor, Row
from third_party.steps import Pace, Steps


def run(config, directory: str | Path, like: str | Path | None = None, rows: int = 8) -> int:
    """Trains what the config describes and leaves everything in `directory`; resumes what lies there already.

    Returns the steps that are done. Raises UserError for bad input.
    """
    directory = Path(directory)
    if config.job != "train" or config.method != "sft":
        raise UserError(
            f"config: got method {config.method!r} of job {config.job!r}; baselines are fine-tuned by 'sft'"
        )

    # ------------------------------------------------------------ what is trained, on what
    origin = resolve(config.model.path or TINY_VL)
    processor = open_processor(origin, config.data.min_pixels, config.data.max_pixels)
    pace, data = Pace.of(config, like), train.open_data(config, config.data.split)
    tuned = Tuned.load(origin, config)  # a broken checkpoint must be told before a workdir is begun with it
    notes = begin(config, directory, processor, like)

    # ------------------------------------------------------------ from where
    checkpoints = Checkpoints(directory / CHECKPOINTS, config.checkpoint.every, config.checkpoint.keep)
    first, state = checkpoints.restore(tuned)
    steps = Steps(data, processor, config, pace, state)
    notes += [tuned.describe()] if state is None else [f"resuming after step {first}"]

    # ------------------------------------------------------------ for how long
    done = first
    with (
        Metrics(directory, first, config.log.every, config.log.tensorboard) as metrics,
        Progress(config.train.steps, first, config.log.progress) as progress,
        preemption.watch() as asked_to_stop,
    ):
        for note in notes:
            progress.say(note)
        while done < config.train.steps:
            values = one_step(tuned, steps, processor, config, done, rows)
            done += 1
            if metrics.due(done):
                metrics.write(done, values)
            progress.update(done, values)
            last, stop = done == config.train.steps, asked_to_stop()
            if last or stop or checkpoints.due(done):
                checkpoints.save(done, tuned, steps.state)
            if stop and not last:
                progress.say(f"stopped after step {done}; the same command goes on from there")
                return done
        if config.checkpoint.export:
            export(tuned, origin, directory / "hf")
            progress.say(f"HF checkpoint: {directory / 'hf'}")
    return done


def begin(config, directory: Path, processor: Processor, like: str | Path | None) -> list[str]:
    """Keeps the config in the workdir. Raises UserError where it was begun with another one."""
    file = directory / CONFIG
    baseline = {"family": processor.config["model_type"], "like": str(like) if like else None}
    baseline["versions"] = {"transformers": transformers.__version__, "torch": torch.__version__}
    notes = []
    if file.exists():
        old, measured = schema.read(file)
        notes = schema.check_resume(old, config)
        earlier = measured.get("baseline", {})
        if any(earlier.get(key) != baseline[key] for key in ("family", "like")):
            raise UserError(f"{directory}: was begun as {earlier or 'a run of ours'}, now it is {baseline}")
    schema.write(config, file, {"baseline": baseline})
    return notes


def one_step(tuned: Tuned, steps: Steps, processor: Processor, config, done: int, rows: int) -> dict[str, float]:
    """Reads a step's examples and updates the model: the numbers of its line in metrics.jsonl."""
    began = time.monotonic()
    taught, examples = next(steps)
    waited = time.monotonic() - began
    rate = float(optimizer.schedule(config.train)(done))
    coefficient = float(sft.coefficients(config, jnp.float32(done / config.train.steps))["next_token"])
    loss, norm = update(tuned, processor, taught, rows, coefficient, rate, config.train.clip)
    seconds = time.monotonic() - began
    if not torch.isfinite(torch.tensor(loss)):
        raise UserError(f"step {done + 1}: the loss is {loss}; expected a finite one: try a lower learning rate")
    return {
        "examples": examples,
        "skipped": steps.skipped,
        "loss/total": loss * coefficient,
        "loss/next_token": loss,
        "learning_rate": rate,
        "grad_norm": norm,
        "tokens_per_second": sum(len(row.ids) for row in taught) / seconds,
        "step_seconds": seconds,
        "data_wait_seconds": waited,
    }


def update(
    tuned: Tuned, processor: Processor, taught: Sequence[Row], rows: int, coefficient: float, rate: float, clip: float
) -> tuple[float, float]:
    """One AdamW step on the mean loss over all tokens that carry one, times `coefficient`; `rows` rows at a time.

    Returns (the loss without the coefficient, the gradients' norm before clipping).
    """
    # The longest first: a step that does not fit memory fails at once, and rows of one length need little padding.
    taught = sorted(taught, key=lambda row: len(row.ids), reverse=True)
    tokens = max(1, sum(sum(row.loss[1:]) for row in taught))
    total = 0.0
    for first in range(0, len(taught), rows):
        inputs, labels = processor.batch(taught[first : first + rows], "right")
        loss = tuned.loss(inputs, labels) / tokens
        (loss * coefficient).backward()
        total += float(loss.detach())
    return total, tuned.step(rate, clip)


@as_command
def main(arguments: list[str]) -> None:
    """Exits with status 2 and one line on standard error for bad input."""
    own, rest = _own_flags(arguments)
    config, workdir = command.parse(rest)
    flags.FLAGS.mark_as_parsed()
    run(config, workdir, **own)


def _own_flags(arguments: Sequence[str]) -> tuple[dict, list[str]]:
    """Takes --like=WORKDIR and --rows=N out."""
    own, rest = {}, []
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name == "--like":
            own["like"] = value
        elif name == "--rows":
            if not value.isdecimal() or int(value) < 1:
                raise UserError(f"--rows: got {value!r}, expected an integer >= 1")
            own["rows"] = int(value)
        else:
            rest.append(argument)
    return own, rest


if __name__ == "__main__":
    main(sys.argv[1:])
