"""A run's checkpoints: written beside the training loop, whole or absent, restored onto any mesh.

Layout: DIRECTORY/STEP/ with one Orbax item for each top-level key of the state (so that the parameters can be read
without the optimiser), `iterator` (where the data stood) and `extra` (JSON). A step under way lies beside it under a
temporary name; a kill leaves that, which the next run removes, and `latest` never sees it.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from latent_jax.errors import UserError

_JSON_ITEMS = ("iterator", "extra")


class Checkpoints:
    """Saves and restores one run.

    Args:
      directory: holds a directory for each step; made on the first use.
      every: steps between checkpoints, see `due`.
      keep: newest steps kept; 0 = all.
      read_only: neither makes nor removes anything (evaluation, conversion).
    """

    def __init__(self, directory: str | Path, every: int = 1, keep: int = 0, *, read_only: bool = False):
        self.directory, self.every = Path(directory).absolute(), every
        if read_only:
            options = ocp.CheckpointManagerOptions(create=False)
        else:
            policy = ocp.checkpoint_managers.LatestN(keep or None)
            options = ocp.CheckpointManagerOptions(preservation_policy=policy, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def due(self, step: int) -> bool:
        """Is a checkpoint wanted after `step` (counted from 1)?"""
        return step % self.every == 0

    def latest(self) -> int | None:
        """The newest whole step, or None."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """Every whole step, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Mapping[str, object], iterator_state: dict, extra: Mapping = {}) -> bool:
        """Begins to write a step; returns when `state` may be changed or donated again, not when the disk has it.

        Args:
          step: the number of finished steps; saved already = nothing happens.
          state: name -> pytree of arrays, e.g. {"params": ..., "optimizer": ...}; names other than iterator, extra.
          iterator_state, extra: JSON-able.
        Returns whether a save was begun. An error of the save before it is raised here, or in `wait`.
        """
        if taken := set(state) & set(_JSON_ITEMS):
            raise ValueError(f"state: {sorted(taken)} are names of the checkpoint's own items")
        if step in self._manager.all_steps():
            return False
        items = {name: ocp.args.StandardSave(tree) for name, tree in state.items()}
        documents = {"iterator": ocp.args.JsonSave(dict(iterator_state)), "extra": ocp.args.JsonSave(dict(extra))}
        return self._manager.save(step, args=ocp.args.Composite(**items, **documents), force=True)

    def restore(self, step: int | None, abstract: Mapping[str, object]) -> tuple[dict, dict, dict]:
        """Reads a step back, the newest for None.

        Args:
          abstract: name -> pytree of jax.ShapeDtypeStruct with shardings, which need not be those of the save.
        Returns (state, iterator_state, extra). Raises UserError if there is no such step, or if names, shapes or the
        tree's structure are not those of the checkpoint.
        """
        step = self._existing(step)
        restored = {name: self._restore(step, name, tree) for name, tree in abstract.items()}
        return restored, self._document(step, "iterator"), self._document(step, "extra")

    def restore_item(self, step: int | None, name: str, abstract=None):
        """Reads one item of the state, e.g. "params"; the others are not touched.

        With `abstract` (as in `restore`) its arrays come back sharded; without it the tree comes back as nested dicts
        and lists of numpy arrays, whatever devices wrote it.
        """
        step = self._existing(step)
        if abstract is None:
            stored = self._metadata(step, name)
            abstract = jax.tree.map(lambda leaf: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape), stored)
        return self._restore(step, name, abstract)

    def extra(self, step: int | None = None) -> dict:
        """The JSON that was saved with a step, the newest for None."""
        return self._document(self._existing(step), "extra")

    def wait(self) -> None:
        """Returns when every save that was begun is on disk; raises if one failed."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then lets go of threads and files."""
        self._manager.close()

    def _existing(self, step: int | None) -> int:
        steps = self.steps()
        if not steps:
            raise UserError(f"{self.directory}: no checkpoint; expected a directory STEP/ that a training run wrote")
        if step is None:
            return steps[-1]
        if step not in steps:
            raise UserError(f"{self.directory}: no checkpoint of step {step}; there are {', '.join(map(str, steps))}")
        return step

    def _item(self, step: int, name: str) -> Path:
        path = self.directory / str(step) / name
        if not path.is_dir():
            there = sorted(one.name for one in path.parent.iterdir() if one.is_dir())
            raise UserError(f"{path.parent}: no item {name!r}; the checkpoint holds {', '.join(there)}")
        return path

    def _metadata(self, step: int, name: str):
        return ocp.StandardCheckpointHandler().metadata(self._item(step, name)).tree

    def _restore(self, step: int, name: str, abstract):
        self._item(step, name)
        stored, wanted = _shapes(self._metadata(step, name)), _shapes(abstract)
        for path in [*wanted, *stored]:
            if stored.get(path) != wanted.get(path):
                raise UserError(
                    f"{self.directory / str(step)}: {name}{path} is {stored.get(path, 'absent')} in the "
                    f"checkpoint, expected {wanted.get(path, 'absent')}"
                )
        args = ocp.args.Composite(**{name: ocp.args.StandardRestore(abstract)})
        return self._manager.restore(step, args=args)[name]

    def _document(self, step: int, name: str) -> dict:
        return json.loads((self._item(step, name) / "metadata").read_text())


def _shapes(tree) -> dict[str, tuple[int, ...]]:
    """Path -> shape. Lists and tuples, dicts and dataclasses read alike: the disk keeps names only."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {"".join(f".{_key(part)}" for part in path): tuple(leaf.shape) for path, leaf in leaves}


def _key(part) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(part, attribute):
            return str(getattr(part, attribute))
    return str(part)
