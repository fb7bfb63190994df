"""AdamW with a schedule and clipping, over a flat dict of trainable arrays."""

import dataclasses
from collections.abc import Collection, Iterable

import numpy as np
import optax

from latent_jax.config.training import Train


def schedule(train: Train) -> optax.Schedule:
    """Learning rate by step: a linear warm-up from 0, then `train.schedule` down to end_factor times the peak."""
    warmup = round(train.warmup * train.steps)
    rest = max(train.steps - warmup, 1)
    peak, end = train.learning_rate, train.learning_rate * train.end_factor
    after = {
        "cosine": optax.cosine_decay_schedule(peak, rest, train.end_factor),
        "linear": optax.linear_schedule(peak, end, rest),
        "constant": optax.constant_schedule(peak),
    }[train.schedule]
    # The first update already moves: a warm-up that starts at exactly 0 would waste a step.
    rise = lambda step: peak * (step + 1) / max(warmup, 1)  # noqa: E731
    return optax.join_schedules([rise, after], [warmup]) if warmup else after


def rates(train: Train, paths: Iterable[str]) -> dict[str, optax.Schedule]:
    """What is logged by step: the learning rate, and the head's where one is trained at a rate of its own."""
    found = {"learning_rate": schedule(train)}
    if train.head_learning_rate and any(map(_of_head, paths)):
        found["head_learning_rate"] = schedule(dataclasses.replace(train, learning_rate=train.head_learning_rate))
    return found


def make(train: Train, paths: Iterable[str], decayed: Collection[str] = ()) -> optax.GradientTransformation:
    """The optimiser of trainable arrays with these dotted paths; `head.*` may learn at a rate of its own.

    decayed: those that weight decay is for (models/parameters.py says which).

    One schedule serves both: its peak is the base rate, and the head's is a multiple of that. Where the base rate is 0,
    the peak is the head's, and everything else stays as it is.
    """
    head = {path: _of_head(path) for path in paths}
    base, own = train.learning_rate, train.head_learning_rate
    if own and base < np.finfo(np.float32).tiny:  # 0 in the arithmetic of the step
        train = dataclasses.replace(train, learning_rate=own)
        scales = [optax.masked(optax.set_to_zero(), {path: not its for path, its in head.items()})]
    else:
        scales = [optax.masked(optax.scale(own / base if own else 1.0), head)]
    stages = [optax.clip_by_global_norm(train.clip)] if train.clip else []
    stages += [
        optax.scale_by_adam(train.beta1, train.beta2, train.epsilon),
        optax.add_decayed_weights(train.weight_decay, {path: path in decayed for path in head}),
        *scales,
        optax.scale_by_learning_rate(schedule(train)),
    ]
    return optax.chain(*stages)


def _of_head(path: str) -> bool:
    return path.startswith("head.")
