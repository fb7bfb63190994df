"""metrics.jsonl and TensorBoard events: one line a step, never torn, never twice."""

import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from latent_jax.errors import UserError
from latent_jax.runtime.events import EventWriter


class Metrics:
    """Writes a run's numbers.

    Args:
      workdir: gets metrics.jsonl and, with `tensorboard`, event files.
      resume_step: the step that was restored, 0 for a fresh start; later lines of an earlier life are removed.
      every: steps between lines, see `due`.
      primary: False on all hosts but one: nothing is touched.
    """

    def __init__(
        self, workdir: str | Path, resume_step: int = 0, every: int = 1, tensorboard: bool = True, primary: bool = True
    ):
        self.every, self._file, self._events = every, None, None
        if not primary:
            return
        workdir = Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / "metrics.jsonl"
        truncate(path, resume_step)
        # Line-buffered: a kill loses nothing of the steps before it.
        self._file = open(path, "a", buffering=1)  # noqa: SIM115 (held open for the run)
        if tensorboard:
            self._events = EventWriter(workdir, resume_step + 1 if resume_step else 0)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def due(self, step: int) -> bool:
        """Is a line wanted for `step` (counted from 1)? Ask before fetching numbers from the device."""
        return self._file is not None and step % self.every == 0

    def write(self, step: int, values: Mapping) -> None:
        """Writes one line, `step` first. Values are numbers or 0-d arrays; what is not finite becomes null."""
        if self._file is None:
            return
        line = {"step": step} | {name: _plain(value) for name, value in values.items()}
        # One write call for the whole line: two would let a kill fall between them.
        self._file.write(json.dumps(line) + "\n")
        if self._events is not None:
            self._events.write(step, values)

    def close(self) -> None:
        """Flushes and lets go of the files."""
        for file in (self._file, self._events):
            if file is not None:
                file.close()
        self._file = self._events = None


def truncate(path: Path, step: int) -> None:
    """Removes the lines after `step`, and a last line that a kill tore, in one replace.

    Raises UserError naming the file and line if another line is no JSON object with a `step`.
    """
    if not path.exists():
        return
    lines, kept = path.read_bytes().splitlines(keepends=True), []
    for number, line in enumerate(lines, 1):
        try:
            at = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            if number == len(lines):
                break
            raise UserError(
                f"{path}:{number}: expected a JSON object with a 'step'; repair or remove the file"
            ) from None
        if at <= step and line.endswith(b"\n"):
            kept.append(line)
    if len(kept) == len(lines):
        return
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(descriptor, "wb") as file:
        file.writelines(kept)
    os.chmod(temporary, path.stat().st_mode)
    os.replace(temporary, path)


def read(path: str | Path) -> list[dict]:
    """Every whole line of a metrics.jsonl, oldest first; a line that is being written is left out."""
    whole = [line for line in Path(path).read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [json.loads(line) for line in whole]


def _plain(value):
    number = value if isinstance(value, (int, str)) else float(value)
    return number if not isinstance(number, float) or math.isfinite(number) else None
