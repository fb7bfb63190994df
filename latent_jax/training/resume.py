"""A run's state on disk: what is saved, what is compared when it is read back, and where a run goes on."""

from pathlib import Path

import jax

from latent_jax.config import schema
from latent_jax.config.training import Config
from latent_jax.errors import UserError
from latent_jax.runtime import checksums
from latent_jax.runtime.checkpoints import DAMAGED, Checkpoints, Damaged
from latent_jax.training import workdir
from latent_jax.training.state import AbstractState, Setup, TrainState


def check_begun(config: Config, directory: Path) -> None:
    """Raises UserError where the run in `directory` cannot go on with this config, or has done more steps than it asks.

    Asked before anything is made or written for it: a latent cache, config.json.
    """
    if (directory / workdir.CONFIG).exists():
        schema.check_resume(schema.read(directory / workdir.CONFIG)[0], config)
    done = max(workdir.steps(directory), default=0)
    if done and not (directory / workdir.CONFIG).exists():
        raise UserError(
            f"{directory}: has checkpoints and no {workdir.CONFIG} that says what they were trained with; bring it "
            "back, or use a new --workdir"
        )
    if done > config.train.steps:
        raise UserError(
            f"config.train.steps: got {config.train.steps}, but {directory} holds a checkpoint of step {done}; "
            f"expected at least {done}, or a new --workdir"
        )


def restore(checkpoints: Checkpoints, setup: Setup, directory: Path) -> tuple[TrainState | None, dict, dict, list[str]]:
    """The newest checkpoint's state, where its data stood, what else it keeps and lines worth saying; None without one.

    Raises UserError where it is damaged, naming the newest whole one; with `checkpoint.fallback` that one is taken, and
    what is damaged is moved out of the way.
    """
    damaged: list[Damaged] = []
    for step in reversed(checkpoints.steps()):
        try:
            found = _restored(checkpoints, setup, step)
        except Damaged as problem:
            damaged.append(problem)
            continue
        if damaged and not setup.config.checkpoint.fallback:
            raise UserError(
                f"{damaged[0]}. The newest whole checkpoint is of step {step}: "
                f"--config.checkpoint.fallback=true goes on from there and moves what is damaged into "
                f"{directory / DAMAGED}; or remove the damaged step yourself"
            )
        return *found, _set_aside(checkpoints, [later for later in checkpoints.steps() if later > step], directory)
    if damaged:
        raise UserError(f"{damaged[0]}. No other checkpoint is whole: remove {checkpoints.directory} to begin again")
    return None, {}, {}, []


def _restored(checkpoints: Checkpoints, setup: Setup, step: int) -> tuple[TrainState, dict, dict]:
    """A step's state, where its data stood and what else it keeps."""
    abstract = setup.abstract()
    found, batches_state, extra = checkpoints.restore(step, _items(abstract))
    if int(found["step"]["step"]) != step:
        raise Damaged(f"{checkpoints.directory / str(step)}: holds step {int(found['step']['step'])}")
    state = TrainState(**abstract._asdict() | found | {"step": found["step"]["step"]})
    return state, batches_state, extra


def _set_aside(checkpoints: Checkpoints, damaged: list[int], directory: Path) -> list[str]:
    """Moves damaged steps away, and says so."""
    if damaged:
        checkpoints.set_aside(damaged, directory / DAMAGED)
    return [f"checkpoint {step} is damaged: moved into {directory / DAMAGED}" for step in damaged]


def check_start(state: TrainState, config: Config, origin: Path) -> None:
    """Raises UserError where a weight that the run begins with, or a statistic, is not finite."""
    _, bad = checksums.examined({**state.trainable, **state.frozen})
    if bad:
        # Statistics follow from the weights: where both are bad, a weight is what was found.
        bad = sorted(bad, key=lambda path: not path.startswith("vlm."))
        where = "random weights" if config.model.init == "random" else origin
        raise UserError(f"{where}: {bad[0]} is not finite (NaN or infinite) before the first step; expected numbers")


def save(checkpoints: Checkpoints, state: TrainState, batches_state: dict, extra: dict) -> None:
    """Begins to write the state, where its data stands and what else a resume compares.

    Raises UserError where an array is not finite.
    """
    items, sums, step = _items(state), {}, int(state.step)
    for name, tree in items.items():
        sums[name], bad = checksums.examined(tree)
        if bad:
            raise UserError(
                f"step {step}: {name}.{bad[0]} is not finite (NaN or infinite), so it is not saved; the checkpoints "
                "before it are whole. Try a lower config.train.learning_rate or config.train.clip"
            )
    checkpoints.save(step, items, batches_state, extra, sums)


def _items(state: TrainState | AbstractState) -> dict:
    """The checkpoint's items: trees only, and only those that hold something (`frozen` may be empty)."""
    items = {**state._asdict(), "step": {"step": state.step}}
    return {name: tree for name, tree in items.items() if jax.tree.leaves(tree)}
