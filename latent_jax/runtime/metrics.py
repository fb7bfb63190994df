"""metrics.jsonl and TensorBoard events: one line a step, never torn, never twice."""

import contextlib
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latent_jax.errors import UserError
from latent_jax.runtime import files
from latent_jax.runtime.events import EventWriter


class Metrics:
    """Writes a run's numbers.

    Args:
      workdir: gets metrics.jsonl and, with `tensorboard`, event files.
      resume_step: the step that was restored, 0 for a fresh start; later lines of an earlier life are removed.
      every: steps between lines, see `due`.
      expected: what `checksum` was at resume_step; None where nobody knows.
      primary: False on all hosts but one: nothing is touched.
    """

    def __init__(
        self,
        workdir: str | Path,
        resume_step: int = 0,
        every: int = 1,
        tensorboard: bool = True,
        primary: bool = True,
        expected: str | None = None,
    ):
        self.every, self._file, self._events, self._sum = every, None, None, hashlib.sha256()
        if not primary:
            return
        workdir = Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / "metrics.jsonl"
        self._sum.update(truncate(path, resume_step))
        if expected is not None and path.exists() and self.checksum() != expected:
            raise UserError(
                f"{path}: its lines up to step {resume_step} are not those that the run wrote (checksum); restore the "
                "file, or move it away to go on without them"
            )
        # Line-buffered: a kill loses nothing of the steps before it.
        self._file = open(path, "a", buffering=1)  # noqa: SIM115 (held open for the run)
        if tensorboard:
            self._events = EventWriter(workdir, resume_step + 1 if resume_step else 0)

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def due(self, step: int) -> bool:
        """Is a line wanted for `step` (counted from 1)? Ask before fetching numbers from the device."""
        return self._file is not None and step % self.every == 0

    def write(self, step: int, values: Mapping) -> None:
        """Writes one line, `step` first. Values are numbers or 0-d arrays; what is not finite becomes null."""
        if self._file is None:
            return
        line = json.dumps({"step": step} | {name: _plain(value) for name, value in values.items()}) + "\n"
        # One write call for the whole line: two would let a kill fall between them.
        with files.naming(self._file.name):
            self._file.write(line)
        self._sum.update(line.encode())
        if self._events is not None:
            self._events.write(step, values)

    def checksum(self) -> str:
        """Of every line that the file holds now."""
        return self._sum.hexdigest()[:16]

    def close(self) -> None:
        """Flushes and lets go of the files."""
        opened, self._file, self._events = (self._file, self._events), None, None
        with contextlib.ExitStack() as closing:
            for file in opened:
                if file is not None:
                    # What a full disk refused once is refused again here.
                    closing.enter_context(files.naming(file.name))
                    closing.callback(file.close)


def truncate(path: Path, step: int) -> bytes:
    """Removes the lines after `step`, and a last line that a kill tore, in one replace. Returns what stays.

    Raises UserError naming the file where it is no regular one, and the line if one is no JSON object with a `step`.
    """
    if not path.exists():
        return b""
    lines, kept = files.read_bytes(path).splitlines(keepends=True), []
    for number, line in enumerate(lines, 1):
        try:
            at = int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            if number == len(lines):
                break
            raise UserError(
                f"{path}:{number}: expected a JSON object with a 'step'; repair or remove the file"
            ) from None
        if at <= step and line.endswith(b"\n"):
            kept.append(line)
    if len(kept) < len(lines):
        with files.whole(path) as file:
            file.writelines(kept)
    return b"".join(kept)


def read(path: str | Path) -> list[dict]:
    """Every whole line of a metrics.jsonl, oldest first; a line that is being written is left out."""
    whole = [line for line in Path(path).read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [json.loads(line) for line in whole]


def _plain(value: Any) -> int | float | str | None:
    number = value if isinstance(value, (int, str)) else float(value)
    return number if not isinstance(number, float) or math.isfinite(number) else None
