"""A run's checkpoints: written beside the training loop, whole or absent, restored onto any mesh.

Layout: DIRECTORY/STEP/ with one Orbax item for each top-level key of the state (so that the parameters can be read
without the optimiser), `iterator` (where the data stood) and `extra` (JSON). A step under way lies beside it under a
temporary name; a kill leaves that, which the next run removes, and `latest` never sees it.

With every step stand the checksums of its arrays (`runtime/checksums.py`), in `extra` under a name of its own, and each
JSON item carries one of itself: both are compared after reading, so that damage on disk is an error.
"""

import asyncio
import contextlib
import errno
import json
import logging
import os
import re
import shutil
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from latent_jax.errors import UserError, one_line, os_error
from latent_jax.runtime import checksums, files, hosts

_JSON_ITEMS = ("iterator", "extra")
_ARRAYS = "array_checksums"
_SAVED_AS = "saved_as"  # run, step, and the checksum of the iterator's document: none may come from another checkpoint
DAMAGED = "damaged_checkpoints"
_OS_ERROR = re.compile(r"os_error_code='(\d{1,4})'")


def _raised_again(record: logging.LogRecord) -> bool:
    """Whether to say it: Orbax's threads and tasks log an error with its traceback, and then raise it where we wait."""
    frames = traceback.extract_tb(record.exc_info[2]) if record.exc_info and record.exc_info[2] else ()
    return not ("orbax" in record.pathname and record.exc_info) and not any("orbax" in f.filename for f in frames)


for _name in ("absl", "asyncio"):
    logging.getLogger(_name).addFilter(_raised_again)


class _Patient(asyncio.SelectorEventLoop):
    """Closes when all its tasks are done. Where one array cannot be read, Orbax leaves the others half read: their
    coroutines and TensorStore's threads would complain at length of a loop that is gone."""

    def close(self) -> None:
        if not self.is_closed() and (rest := asyncio.all_tasks(self)):
            self.run_until_complete(asyncio.gather(*rest, return_exceptions=True))
        super().close()


class _PatientLoops(asyncio.DefaultEventLoopPolicy):
    def new_event_loop(self) -> asyncio.AbstractEventLoop:
        return _Patient()


class Damaged(UserError):
    """A checkpoint that cannot be read back as it was written: which file of it, and what is wrong."""


class Checkpoints:
    """Saves and restores one run.

    Args:
      directory: holds a directory for each step; made on the first use.
      every: steps between checkpoints, see `due`.
      keep: newest steps kept; 0 = all.
      read_only: neither makes nor removes anything (evaluation, conversion).
      run: the run's own name, which its steps carry: a step of another is damage. None where nobody knows.

    Raises UserError where something else than a directory has its name.
    """

    def __init__(
        self, directory: str | Path, every: int = 1, keep: int = 0, *, read_only: bool = False, run: str | None = None
    ):
        self.directory, self.every, self._run = Path(directory).absolute(), every, run
        self._policy: asyncio.AbstractEventLoopPolicy | None = None
        if os.path.lexists(self.directory) and not self.directory.is_dir():
            raise UserError(f"{self.directory}: not a directory; expected a run's checkpoints, or nothing")
        self._check_names()
        if read_only:
            options = ocp.CheckpointManagerOptions(create=False)
        else:
            _remove_unfinished(self.directory)
            policy = ocp.checkpoint_managers.LatestN(keep or None)
            options = ocp.CheckpointManagerOptions(preservation_policy=policy)
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def _check_names(self) -> None:
        """Raises UserError where no directory has a step's name: Orbax does not see it, and may fail to save there."""
        odd = [path for path in self.directory.glob("*") if path.name.isdecimal() and not path.is_dir()]
        if odd:
            raise UserError(f"{odd[0]}: not a directory; expected a checkpoint of that step, or nothing: move it away")

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
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

    def save(
        self,
        step: int,
        state: Mapping[str, object],
        iterator_state: dict,
        extra: Mapping = {},
        sums: Mapping[str, checksums.Sums] | None = None,
    ) -> bool:
        """Begins to write a step; returns when `state` may be changed or donated again, not when the disk has it.

        Args:
          step: the number of finished steps; saved already = nothing happens.
          state: name -> pytree of arrays, e.g. {"params": ..., "optimizer": ...}; names other than iterator, extra.
          iterator_state, extra: JSON-able.
          sums: name -> checksums of the arrays in `state` (see `checksums.of`).
        Returns whether a save was begun. An error of the save before it is raised here, or in `wait`.
        """
        if taken := set(state) & set(_JSON_ITEMS):
            raise ValueError(f"state: {sorted(taken)} are names of the checkpoint's own items")
        if step in self._manager.all_steps():
            return False
        items = {name: ocp.args.StandardSave(tree) for name, tree in state.items()}
        extra = {
            **extra,
            _ARRAYS: dict(sums) if sums is not None else {n: checksums.of(t) for n, t in state.items()},
            _SAVED_AS: {"run": self._run, "step": step, "iterator": _sum(iterator_state)},
        }
        documents = {"iterator": files.sealed(iterator_state), "extra": files.sealed(extra)}
        documents = {name: ocp.args.JsonSave(document) for name, document in documents.items()}
        # Until `close`: Orbax's threads make their loops when they come to it. As in reading, of many arrays that
        # cannot be written the first ends the loop.
        if self._policy is None:
            self._policy = asyncio.get_event_loop_policy()
            asyncio.set_event_loop_policy(_PatientLoops())
        with self._writing():
            return self._manager.save(step, args=ocp.args.Composite(**items, **documents), force=True)

    def restore(self, step: int | None, abstract: Mapping[str, object]) -> tuple[dict, dict, dict]:
        """Reads a step back, the newest for None.

        Args:
          abstract: name -> pytree of jax.ShapeDtypeStruct with shardings, which need not be those of the save.
        Returns (state, iterator_state, extra). Raises UserError if there is no such step, or if names, shapes or the
        tree's structure are not those of the checkpoint, and Damaged where it is not what was written, or holds numbers
        that are not finite. Several hosts call this together, and what one of them cannot read, all raise.
        """
        step = self._existing(step)
        documents = _on_all_hosts(self.directory / str(step), lambda: self._documents(step))
        sums = documents["extra"].get(_ARRAYS, {})
        restored = {n: self._restore(step, n, tree, sums.get(n), finite=True) for n, tree in abstract.items()}
        return restored, documents["iterator"], _own(documents["extra"])

    def restore_item(self, step: int | None, name: str, abstract: Any = None) -> Any:
        """Reads one item of the state, e.g. "params"; the others are not touched.

        With `abstract` (as in `restore`) its arrays come back sharded; without it the tree comes back as nested dicts
        and lists of numpy arrays, whatever devices wrote it.
        """
        step = self._existing(step)
        if abstract is None:
            stored = self._metadata(step, name)
            abstract = jax.tree.map(lambda leaf: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape), stored)
        extra = _on_all_hosts(self.directory / str(step) / "extra", lambda: self._document(step, "extra"))
        return self._restore(step, name, abstract, extra.get(_ARRAYS, {}).get(name))

    def extra(self, step: int | None = None) -> dict:
        """The JSON that was saved with a step, the newest for None."""
        return _own(self._document(self._existing(step), "extra"))

    def wait(self) -> None:
        """Returns when every save that was begun is on disk; raises if one failed."""
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then lets go of threads and files."""
        try:
            with self._writing():
                self._manager.close()
        finally:
            if self._policy is not None:
                asyncio.set_event_loop_policy(self._policy)
                self._policy = None

    def set_aside(self, steps: list[int], to: Path) -> None:
        """Moves steps out of the way, into the folder `to`, each under a name that is free there.

        Several hosts call this together: one moves, and all know of it afterwards.
        """
        hosts.sync("every host has read the checkpoints")
        if hosts.primary():
            to.mkdir(parents=True, exist_ok=True)
            for step in steps:
                taken = [path.name for path in to.iterdir()]
                name = next(n for n in (f"{step}", *(f"{step}.{i}" for i in range(1, 10**6))) if n not in taken)
                shutil.move(self.directory / str(step), to / name)
        hosts.sync("the first host has moved the damaged checkpoints")
        self._manager.reload()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """A disk that is full or gone speaks through several libraries, in many lines."""
        try:
            yield
        except UserError:
            raise
        except Exception as problem:
            if reason := _of_the_disk(problem):
                raise UserError(f"{self.directory}: a checkpoint cannot be written: {reason}") from None
            raise

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
            raise Damaged(f"{path}: no item {name!r}; the checkpoint holds {', '.join(there) or 'nothing'}")
        # Before TensorStore opens it: a pipe in a file's place would be waited for.
        if odd := [each for each in sorted(path.rglob("*")) if not each.is_file() and not each.is_dir()]:
            raise Damaged(f"{odd[0]}: not a regular file")
        return path

    def _metadata(self, step: int, name: str) -> Any:
        path = self._item(step, name)
        with _reading(path):
            tree = ocp.StandardCheckpointHandler().metadata(path).tree
            if tree is None:
                raise Damaged(f"{path}: cannot be read back: it says nothing of its arrays")
            return tree

    def _restore(self, step: int, name: str, abstract: Any, saved: checksums.Sums | None, finite: bool = False) -> Any:
        restored = _on_all_hosts(self.directory / str(step) / name, lambda: self._read(step, name, abstract))
        self._compare(step, name, restored, saved, finite)
        return restored

    def _read(self, step: int, name: str, abstract: Any) -> Any:
        item = self._item(step, name)
        stored, wanted = _shapes(self._metadata(step, name)), _shapes(abstract)
        for path in [*wanted, *stored]:
            if stored.get(path) != wanted.get(path):
                raise UserError(
                    f"{self.directory / str(step)}: {name}{path} is {stored.get(path, 'absent')} in the "
                    f"checkpoint, expected {wanted.get(path, 'absent')}"
                )
        with _reading(item):
            # Not the manager's: after each item it waits for every host, also for one that could not read it.
            return ocp.StandardCheckpointHandler().restore(item, args=ocp.args.StandardRestore(abstract))

    def _compare(self, step: int, name: str, restored: object, saved: checksums.Sums | None, finite: bool) -> None:
        """Raises Damaged where an array is not the one that was saved, or not `finite` where it must be.

        Checkpoints of earlier versions have no sums (None), and may hold what is not finite.
        """
        if saved is None and not finite:
            return
        found, bad = checksums.examined(restored)
        if finite and bad:
            raise Damaged(f"{self._item(step, name)}: {bad[0]} was not finite (NaN or infinite) when it was saved")
        saved = found if saved is None else saved
        wrong = sorted(path for path in {**saved, **found} if saved.get(path) != found.get(path))
        if wrong:
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            raise Damaged(f"{self._item(step, name)}: {wrong[0]}{more} is not what was saved (checksum)")

    def _documents(self, step: int) -> dict[str, dict]:
        found = {name: self._document(step, name) for name in _JSON_ITEMS}
        # Earlier versions have not kept it.
        if found["extra"].get(_SAVED_AS, {}).get("iterator") not in (None, _sum(found["iterator"])):
            raise Damaged(f"{self._item(step, 'iterator')}: is of another checkpoint than {step}")
        return found

    def _document(self, step: int, name: str) -> dict:
        file = self._item(step, name) / "metadata"
        try:
            found = files.opened(files.read_json(file))
            if (saved := found.get(_SAVED_AS, {}).get("step", step)) != step:
                raise ValueError(f"was saved as step {saved}, not {step}")
            # Earlier versions have not kept it.
            if (owner := found.get(_SAVED_AS, {}).get("run")) != self._run and owner and self._run:
                raise ValueError("was saved by another run than the one that config.json is of")
            return found
        except ValueError as problem:
            raise Damaged(f"{file}: {problem}") from None
        except UserError as problem:
            raise Damaged(str(problem)) from None


def _remove_unfinished(directory: Path) -> None:
    """Removes what a killed save left. Orbax would do it in a thread that only the next save waits for: a command that
    saves nothing may end first, and then the thread fails and the folders stay."""
    if hosts.primary() and directory.exists():
        for path in sorted(directory.iterdir()):
            if ocp.utils.TMP_DIR_SUFFIX in path.name and path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)


def _on_all_hosts(path: Path, read: Callable[[], Any]) -> Any:
    """What `read` gives, where it succeeds on every host. Else all raise: what follows is collective."""
    problem, found = None, None
    try:
        found = read()
    except UserError as caught:
        problem = caught
    if hosts.summed({"failed": float(problem is not None)})()["failed"]:
        raise problem or Damaged(f"{path}: another host cannot read it back")
    return found


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Whatever a library says of files that it cannot make sense of is damage, and names where it was met."""
    before = asyncio.get_event_loop_policy()
    asyncio.set_event_loop_policy(_PatientLoops())
    try:
        yield
    except UserError:
        raise
    except Exception as problem:
        if isinstance(problem, MemoryError) or "RESOURCE_EXHAUSTED" in str(problem):
            raise
        raise Damaged(f"{path}: cannot be read back: {_first(problem)}") from None
    finally:
        asyncio.set_event_loop_policy(before)


def _first(problem: BaseException) -> str:
    """What an error says, in at most 200 characters of one line."""
    said = one_line(problem).partition(" See full TensorStore details")[0] or type(problem).__name__
    return said if len(said) <= 200 else said[:197] + "..."


def _of_the_disk(problem: BaseException | None) -> str:
    """What the operating system refused, in an error or in what caused it, or "". TensorStore only quotes it: by its
    number, by its words, or both."""
    words = [os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES)]
    while problem is not None:
        if isinstance(problem, OSError):
            return os_error(problem)
        if number := _OS_ERROR.search(str(problem)):
            return os.strerror(int(number[1]))
        if said := [word for word in words if word in str(problem)]:
            return said[0]
        problem = problem.__cause__ or problem.__context__
    return ""


def _own(extra: dict) -> dict:
    return {name: value for name, value in extra.items() if name not in (_ARRAYS, _SAVED_AS)}


def _sum(document: Mapping) -> str:
    return files.checksum(json.dumps(json.loads(json.dumps(document)), sort_keys=True))  # as it is read back


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Path -> shape. Lists and tuples, dicts and dataclasses read alike: the disk keeps names only."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {f".{checksums.dotted(path)}" if path else "": tuple(leaf.shape) for path, leaf in leaves}
