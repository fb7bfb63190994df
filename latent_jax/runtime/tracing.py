"""A trace of some steps of a run, for TensorBoard's profiler or Perfetto."""

from pathlib import Path
from typing import Any

import jax


class Tracing:
    """Traces `steps`, counted from 1, into `directory`, on every host its own devices, until the run ends."""

    def __init__(self, steps: range, directory: Path):
        self._steps, self._directory, self._running = steps, directory, False

    def __enter__(self) -> "Tracing":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def before(self, step: int) -> None:
        """Begins where `step` is the first of them, or the first that this process runs."""
        if step in self._steps and not self._running:
            jax.profiler.start_trace(str(self._directory))
            self._running = True

    def after(self, step: int, results: Any) -> None:
        """Ends with the last of them, once the device has its `results`."""
        if self._running and step + 1 not in self._steps:
            jax.block_until_ready(results)
            self._stop()

    def _stop(self) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
