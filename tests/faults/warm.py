"""Commands of the package in forked children of one process that has imported everything and started nothing.

Importing jax, orbax, transformers and TFDS takes longer than a tiny run. A fork is sound here because the parent has
one thread and no backend; `check` looks. What a child does after that (threads, devices, temporary files) is its own.
"""

import atexit
import contextlib
import dataclasses
import importlib
import os
import resource
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

# At this module's import, before numpy's: its BLAS starts its threads there.
os.environ["OMP_NUM_THREADS"] = "1"

REPOSITORY = Path(__file__).resolve().parents[2]
MODULES = (
    "jax", "orbax.checkpoint", "grain", "tensorflow_datasets", "array_record.python.array_record_module",
    "transformers", "transformers.models.auto.tokenization_auto", "PIL.Image",
    "latent_jax.main", "latent_jax.train", "latent_jax.evaluate", "latent_jax.convert", "latent_jax.generate",
    "latent_jax.prepare", "latent_jax.inference.vlm", "latent_jax.training.target_cache", "latent_jax.methods.pretrain",
    "latent_jax.analysis.probe", "latent_jax.data.builders.build", "latent_jax.benchmarks.gqa",
)  # fmt: skip
MEMORY = 24 * 2**30  # of address space: XLA and malloc reserve far more than they touch
WRITTEN = 2**30  # bytes of a file: one that was made huge must not be copied


@dataclasses.dataclass(frozen=True)
class Said:
    """How a command ended: its status (-N for signal N), what it said, seconds, the peak of its resident bytes."""

    status: int
    out: str
    err: str
    seconds: float
    peak: int
    hung: bool = False


def prepare_process(cache: Path) -> None:
    """Sets the environment that jax reads at its import, then imports. Before anything else in the process."""
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": str(cache / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        "LATENT_JAX_CACHE": str(cache),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    for name in MODULES:
        importlib.import_module(name)
    # jax warns of any fork; `check` is what makes this one sound.
    warnings.filterwarnings("ignore", message=".*os.fork.*")
    check()


def check() -> None:
    """Raises RuntimeError where a fork would not be sound."""
    from jax._src import xla_bridge

    threads = len(os.listdir("/proc/self/task"))
    if threads != 1 or xla_bridge._backends:
        raise RuntimeError(f"not to be forked: {threads} threads, backends {list(xla_bridge._backends)}")


def fork(work: Callable[[], int]) -> int:
    """A child that does `work` and exits with what it returns; its process id."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        status = work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def start(module: str, arguments: Sequence[str], place: Path) -> int:
    """Starts `python -m latent_jax.MODULE ARGUMENTS` in `place`, as a process group; what it says goes into
    place/../said.out and said.err, its temporary files into place/../tmp."""
    return fork(lambda: _become(module, list(arguments), place))


def run(module: str, arguments: Sequence[str], place: Path, limit: float, kill_after: float | None = None) -> Said:
    """Runs a command to its end; after `kill_after` or `limit` seconds it is killed with all that it started."""
    began = time.monotonic()
    child, hung = start(module, arguments, place), False
    try:
        while True:
            pid, status, used = os.wait4(child, os.WNOHANG)
            seconds = time.monotonic() - began
            if pid:
                break
            if seconds > min(limit, kill_after or limit):
                hung = kill_after is None
                _kill(child)
                _, status, used = os.wait4(child, 0)
                break
            time.sleep(0.01)
    except KeyboardInterrupt:  # it leads a group of its own, which the terminal does not reach
        _kill(child)
        raise
    out, err = ((place.parent / f"said.{name}").read_text(errors="replace") for name in ("out", "err"))
    return Said(os.waitstatus_to_exitcode(status), out, err, seconds, used.ru_maxrss * 1024, hung)


def _kill(child: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)


def _become(module: str, arguments: list[str], place: Path) -> int:
    """The forked child: as the interpreter would run the module, exit handlers and threads included."""
    os.setpgid(0, 0)
    temporary = place.parent / "tmp"
    temporary.mkdir(exist_ok=True)
    os.environ["TMPDIR"], tempfile.tempdir = str(temporary), None
    for number, name, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, place.parent / "said.out", os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        (2, place.parent / "said.err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
    ):
        opened = os.open(name, flags, 0o644)
        os.dup2(opened, number)
        os.close(opened)
    os.chdir(place)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (WRITTEN, WRITTEN))
    sys.argv = [f"latent_jax.{module}", *arguments]
    from latent_jax.runtime.command import begin_command

    begin_command()
    status = _status(importlib.import_module(f"latent_jax.{module}").main)
    with contextlib.suppress(Exception):
        threading._shutdown()
        atexit._run_exitfuncs()
    return status


def _status(main: Callable) -> int:
    try:
        return main() or 0
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
    except BaseException:
        traceback.print_exc()
        return 1
