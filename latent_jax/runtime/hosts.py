"""Several hosts as one run: how they find each other, share a batch, agree on numbers, and end together.

A host is one process here. Host 0 writes metrics, config, exports and reports; checkpoints are written by all of them.
When a host is lost the coordination service of jax ends every other one within `hosts.timeout` seconds, so that nobody
waits for ever in a collective; started again with the same command they go on from the last checkpoint.
"""

import contextlib
import functools
import itertools
import json
import os
import re
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from latent_jax.errors import UserError, one_line, os_error, say_line
from latent_jax.runtime import sharding

# How long a host that ends waits for the others to end too, before it leaves them to find out (seconds).
_FAREWELL = 10
_WEEK = 7 * 24 * 3600 * 1000  # milliseconds; a lost host ends every barrier much sooner
_COLLECTIVE = re.compile(r"Gloo|NCCL|UNAVAILABLE|coordination service", re.IGNORECASE)
# What environments say that start one process on each of several hosts.
_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "MEGASCALE_NUM_SLICES")


@runtime_checkable
class Settings(Protocol):
    """The config's section `hosts`; this package does not import the config's."""

    @property
    def cluster(self) -> str: ...

    @property
    def coordinator(self) -> str: ...

    @property
    def count(self) -> int: ...

    @property
    def index(self) -> int: ...

    @property
    def timeout(self) -> int: ...

    @property
    def start_timeout(self) -> int: ...


def primary() -> bool:
    """Is this the host that writes what one host writes?"""
    return jax.process_index() == 0


@contextlib.contextmanager
def joined(settings: Settings) -> Iterator[None]:
    """Joins the hosts of this run, for as long as the block runs; alone, does nothing.

    `settings` is the config's section `hosts`. With several hosts an exception ends this process at once: with status 2
    for a UserError, else 1. A clean end waits for all of them. Must come before anything that starts jax's backend.
    Raises UserError where the hosts do not find each other within `hosts.start_timeout` seconds.
    """
    if not _several(settings):
        yield
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    where = "host {} of {}".format(*_initialise(settings))
    herald = _Herald(
        f"latent_jax: {where} ended without a word: it was killed, or it ended because another host was lost (jax's "
        f"own lines above say which). All hosts end within about {settings.timeout} s; started again with the same "
        "command they go on from the last checkpoint"
    )
    try:
        yield
    except BaseException as problem:
        _end(problem, where, herald)
    # Host 0 may have been busy for long with a report; whoever dies meanwhile ends this too.
    sync("the end")
    herald.dismiss()
    jax.distributed.shutdown()


def _several(settings: Settings) -> bool:
    if settings.cluster == "auto":
        counts = [_count(name) for name in _COUNTS]
        return bool(settings.coordinator) or max(counts) > 1 or "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
    return settings.cluster != "none"


def _count(name: str) -> int:
    found = os.environ.get(name) or "1"
    if not found.isascii() or not found.isdigit():
        raise UserError(
            f"${name}: got {found[:40]!r}, expected how many processes were started, or --config.hosts.cluster=none"
        )
    return int(found)


def _initialise(settings: Settings) -> tuple[int, int]:
    """(this host, how many), from the coordination service: jax.process_index() would start the backend."""
    named = bool(settings.coordinator)
    method = "deactivate" if named else settings.cluster
    # Where jax's own patience ends, it aborts the process from C++. Ours ends first, in one line.
    alone = threading.Timer(settings.start_timeout, _nobody_came, [settings])
    alone.daemon = True
    alone.start()
    try:
        jax.distributed.initialize(
            coordinator_address=settings.coordinator or None,
            num_processes=settings.count if named else None,
            process_id=settings.index if named else None,
            # Of TPUs jax knows several environments, and tells them apart.
            cluster_detection_method=None if method in ("auto", "tpu") else method,
            initialization_timeout=settings.start_timeout + _FAREWELL,
            heartbeat_timeout_seconds=settings.timeout,
            shutdown_timeout_seconds=_FAREWELL,
        )
    except (LookupError, ImportError) as problem:  # what a cluster's own launcher sets, or its package
        lacks = (
            f"{problem.args[0]} is not in the environment" if isinstance(problem, LookupError) else one_line(problem)
        )
        raise UserError(
            f"config.hosts.cluster: got {settings.cluster!r}, but {lacks}; expected it where that cluster's launcher "
            "started this process"
        ) from None
    except (ValueError, RuntimeError, OSError) as problem:
        said = (str(problem).splitlines() or [type(problem).__name__])[0]
        raise UserError(f"config.hosts: the hosts did not find each other: {said}") from None
    finally:
        alone.cancel()
    return _service().process_id, _service().num_processes


def _nobody_came(settings: Settings) -> NoReturn:
    of = f" of {settings.count} at {settings.coordinator}" if settings.coordinator else ""
    say_line(
        f"error: config.hosts: the hosts{of} did not find each other within {settings.start_timeout} s "
        "(config.hosts.start_timeout); expected every one of them to be started with the same coordinator and count"
    )
    os._exit(2)


def _end(problem: BaseException, where: str, herald: "_Herald") -> NoReturn:
    """Says why this host ends, gives the others a moment to end for the same reason, and ends."""
    if isinstance(problem, OSError):
        problem = UserError(os_error(problem))
    if isinstance(problem, KeyboardInterrupt):
        say_line("interrupted")
        problem = SystemExit(130)
    status = 2 if isinstance(problem, UserError) else problem.code if isinstance(problem, SystemExit) else 1
    if isinstance(problem, UserError):
        print(f"error: {where}: {problem}", file=sys.stderr)
    elif not isinstance(problem, SystemExit):
        traceback.print_exception(problem)
    if _speaks_of_a_lost_host(problem):
        print(
            f"error: {where}: a computation shared by all hosts failed: most likely another host was lost; this one "
            "ends. Started again with the same command, all go on from the last checkpoint",
            file=sys.stderr,
        )
    sys.stderr.flush()
    herald.dismiss()
    with contextlib.suppress(Exception):
        # Where all hosts met the same error they leave together; otherwise the others are notified after this time.
        _service().client.wait_at_barrier("latent_jax: an early end", timeout_in_ms=_FAREWELL * 1000)
        jax.distributed.shutdown()
    os._exit(status if isinstance(status, int) else 1)


def _speaks_of_a_lost_host(problem: BaseException) -> bool:
    """jax raises what a collective met as its own error or, where it is met while dispatching, as a ValueError."""
    return isinstance(problem, jax.errors.JaxRuntimeError) or bool(_COLLECTIVE.search(str(problem)))


def _service() -> Any:
    from jax._src import distributed  # jax has no public way to a barrier that needs no device

    return distributed.global_state


class _Herald:
    """A child that prints one line if this process ends without dismissing it.

    A shell per host, because nothing smaller covers both endings that it is for: jax ends the process from C++ when
    another host is lost, and a scheduler ends it with SIGKILL. Neither runs `atexit` or a signal handler. Only a
    process outside sees the pipe close, and a scheduler's log does not name the host or how to go on. It sleeps in
    `read` for the whole run, and is a shell rather than a fork: jax's threads would not survive a fork.
    """

    def __init__(self, line: str):
        script = 'read -r word; [ "$word" = dismissed ] || printf "%s\\n" "$1" >&2'
        self._child = subprocess.Popen(
            ["sh", "-c", script, "sh", line], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
        )

    def dismiss(self) -> None:
        with contextlib.suppress(OSError):
            self._child.communicate(b"dismissed\n")


# ---------------------------------------------------------------- agreeing


def sync(name: str) -> None:
    """Returns once every host has come here, however long that takes; each place in the code has its own name."""
    if jax.process_count() > 1:
        _service().client.wait_at_barrier(f"latent_jax: {name}", timeout_in_ms=_WEEK)


def agree(name: str, values: Mapping[str, str]) -> None:
    """Raises UserError, on every host, where hosts came with different `values`: which key, and what two of them have.

    Needs no device and no collective: hosts that were started differently could not even form one.
    """
    if jax.process_count() == 1:
        return
    client, mine = _service().client, jax.process_index()
    client.key_value_set(f"latent_jax/{name}/{mine}", json.dumps(dict(values)))
    theirs = [
        json.loads(client.blocking_key_value_get(f"latent_jax/{name}/{host}", _WEEK))
        for host in range(jax.process_count())
    ]
    for host, found in enumerate(theirs):
        for key in {**theirs[0], **found}:
            if theirs[0].get(key) != found.get(key):
                raise UserError(
                    f"{key}: host 0 has {theirs[0].get(key, 'none')}, host {host} has {found.get(key, 'none')}; "
                    "expected the same command, data and installation on every host"
                )


def meet(mesh: Mesh) -> None:
    """Connects the devices of all hosts, while the hosts are here together.

    gloo gives them 30 seconds to connect in their first collective, and in a first step one host's compiler may take
    longer than that after another's. Every group of devices that the mesh's axes can form is connected, for good.
    """
    if jax.process_count() == 1:
        return
    sync("the hosts meet")
    if mesh.devices.flat[0].platform == "cpu":
        one_each = jax.jit(lambda: jnp.ones(mesh.size), out_shardings=NamedSharding(mesh, P(mesh.axis_names)))()
        wide = [name for name, size in mesh.shape.items() if size > 1]
        for axes in itertools.chain.from_iterable(itertools.combinations(wide, n + 1) for n in range(len(wide))):
            add = functools.partial(jax.lax.psum, axis_name=axes)
            spec = P(mesh.axis_names)
            jax.jit(jax.shard_map(add, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))(
                one_each
            ).block_until_ready()
    summed({"met": 1})()


def expect_shared(path: Path, patience: float = 60.0) -> None:
    """Waits until this host too sees a file that host 0 wrote; UserError after `patience` seconds without it."""
    given_up = time.monotonic() + patience
    while not path.exists():
        if time.monotonic() > given_up:
            raise UserError(f"{path}: host 0 wrote it, and it is not here; expected a --workdir that all hosts share")
        time.sleep(0.2)


def summed(values: Mapping[str, float]) -> Callable[[], dict[str, float]]:
    """Begins to add every host's values; the result is there when the function that comes back is called.

    All hosts call this in the same order with the same names. The sums are exact in float64, and the same everywhere.
    """
    if jax.process_count() == 1:
        return lambda: dict(values)
    mine = np.array(list(values.values()), np.float64).view(np.uint8)
    firsts = [min(jax.local_devices(index), key=lambda device: device.id) for index in range(jax.process_count())]
    mesh = Mesh(np.array(firsts), ("host",))
    whole = (len(firsts), len(mine))
    rows = jax.make_array_from_process_local_data(NamedSharding(mesh, P("host")), mine[None], whole)
    everywhere = _copy(NamedSharding(mesh, P()))(rows)

    def read() -> dict[str, float]:
        found = np.asarray(everywhere).view(np.float64).sum(axis=0)
        return dict(zip(values, found.tolist(), strict=True))

    return read


@functools.cache
def _copy(to: NamedSharding) -> Callable:
    return jax.jit(lambda rows: rows, out_shardings=to)


# ---------------------------------------------------------------- sharing a batch


def own_groups(mesh: Mesh, groups: int) -> list[int]:
    """Which of a micro-step's groups this host's devices see, ascending."""
    indices = sharding.batch_sharding(mesh).addressable_devices_indices_map((1, groups))
    held = [index[1] for index in indices.values() if index is not None]
    return sorted({group for part in held for group in range(*part.indices(groups))})


def place(batch: Mapping[str, np.ndarray], mesh: Mesh, groups: int) -> dict[str, jax.Array]:
    """The global batch (A, G, ...) on the devices, from this host's groups of it in ascending order."""
    to = sharding.batch_sharding(mesh)
    if jax.process_count() == 1:
        return jax.device_put(dict(batch), to)
    return {
        name: jax.make_array_from_process_local_data(to, array, (array.shape[0], groups, *array.shape[2:]))
        for name, array in batch.items()
    }


def local_mesh() -> Mesh:
    """A mesh of this host's devices alone, weights split over all of them."""
    return sharding.make_mesh(1, -1, 1, jax.local_devices())
