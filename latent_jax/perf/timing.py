"""Two sides timed in turn, and what a number needs beside it to mean something: versions, date, cores, load."""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import importlib.util
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from latent_jax.errors import UserError
from latent_jax.runtime import provenance


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of every run of one side: on the clock, and of processor time summed over all threads."""

    wall: list[float]
    processor: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.wall)

    @property
    def processor_median(self) -> float:
        return statistics.median(self.processor)


@dataclasses.dataclass(frozen=True)
class Report:
    """What was measured: a title, lines to print, and every number for the JSON file."""

    title: str
    lines: list[str]
    numbers: dict


def alternate(sides: Mapping[str, Callable[[], object]], repeats: int, warm_up: int = 1) -> dict[str, Times]:
    """Runs every side in turn (ours, theirs, ours, ...), so that what else the machine does meets all alike.

    A side returns when its work is done. The first `warm_up` rounds, which compile and fill caches, are not counted.
    """
    times = {name: Times([], []) for name in sides}
    for turn in range(warm_up + repeats):
        for name, run in sides.items():
            began, spent = time.perf_counter(), time.process_time()
            run()
            if turn >= warm_up:
                times[name].wall.append(time.perf_counter() - began)
                times[name].processor.append(time.process_time() - spent)
    return times


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def circumstances() -> dict:
    """Versions, date, machine and how busy it is."""
    found = provenance.versions()
    for package in ("torch", "pillow"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return {
        "versions": found,
        "commit": provenance.git_commit(),
        "date": datetime.date.today().isoformat(),
        "machine": platform.processor() or platform.machine(),
        "cores": cores(),
        "load_average": [round(value, 2) for value in os.getloadavg()],
    }


def need_torch(asked: str, instead: str = "") -> None:
    """Raises UserError where torch is absent. The hint: a plain install of it may bring gigabytes of CUDA along."""
    if importlib.util.find_spec("torch") is None:
        raise UserError(
            f"{asked}: torch is not installed; {instead}install its CPU build first, by the command that "
            "https://pytorch.org gives for CPU, then pip install -c constraints.txt -e '.[bench]'"
        )


@contextlib.contextmanager
def profiled(directory: Path | None) -> Iterator[None]:
    """Writes a profile of what runs inside to `directory`, for TensorBoard or Perfetto; nothing where it is None."""
    if directory is None:
        yield
        return
    import jax

    with jax.profiler.trace(str(directory)):
        yield


def compared(unit: str, amount: float, times: Mapping[str, Times], ours: str = "ours") -> tuple[list[str], dict]:
    """Lines and numbers of a race: `amount` of `unit` a run; the ratio is to the fastest of the others."""
    lines: list[str] = []
    numbers: dict[str, object] = {}
    for name, each in times.items():
        numbers[name] = {
            "median_seconds": each.median,
            f"{unit}_per_second": amount / each.median,
            "processor_median_seconds": each.processor_median,
            "seconds": each.wall,
        }
        clock = f"{1e3 * min(each.wall):.1f} to {1e3 * max(each.wall):.1f} ms"
        lines.append(
            f"{name:<22} {1e3 * each.median:>9.1f} ms  {amount / each.median:>9.1f} {unit}/s  "
            f"({clock}; processor {1e3 * each.processor_median:.1f} ms)"
        )
    others = [each for name, each in times.items() if name != ours]
    if others:
        best = min(each.median for each in others)
        thrift = min(each.processor_median for each in others)
        ratio, by_processor = best / times[ours].median, thrift / times[ours].processor_median
        numbers |= {"ratio": ratio, "processor_ratio": by_processor}
        lines.append(f"ratio {ratio:.2f} (by processor time {by_processor:.2f})")
    return lines, numbers
