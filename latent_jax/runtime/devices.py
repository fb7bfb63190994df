"""What a process sets up once, before its first computation."""

import contextlib
import ctypes
import os
import warnings

import jax

from latent_jax.runtime import files


def divide_cpu(count: int) -> None:
    """Makes a CPU show itself as `count` devices. XLA runs most of a small model's operations on one thread each, so a
    device a core is how a small model uses them all. Nothing happens on accelerators, or once jax has started.
    """
    if count > 1 and "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", count)


def keep_freed_memory() -> None:
    """Tells glibc's malloc to keep what the process frees, for programs that compute on a CPU.

    XLA allocates the intermediate values of every step anew. By default malloc maps blocks of that size from the kernel
    and gives them back, and the page faults of filling them again take 40 % of the tiny model's processor time
    (docs/performance.md). Where the C library has no mallopt, nothing happens.
    """
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # malloc.h
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(top_pad, 1 << 30)  # of address space; only what is written to becomes memory


def compiler_options(platform: str) -> dict[str, int]:
    """How a program with many intermediate values is compiled for this platform.

    malloc keeps what a thread frees only in blocks of less than 64 MiB (the arenas of `keep_freed_memory`), so on a CPU
    the intermediate values lie in several blocks of half of that instead of in one. XLA cannot keep such a program in a
    cache: it is compiled at every start.
    """
    return {"xla_multiheap_size_constraint_per_heap": 32 * 2**20} if platform == "cpu" else {}


def enable_compile_cache() -> None:
    """Keeps compiled programs between processes, so that a resumed run starts where it left off, not with a compile.

    They lie in files.cache_directory()/xla, all but a CPU's training step (`compiler_options`). A cache that was chosen
    for jax itself (JAX_COMPILATION_CACHE_DIR) stays; a directory that cannot be made is done without, and so is the
    cache where a CPU shows several devices: a program of theirs that XLA loads, rather than compiles, can wait for ever
    in a collective while another process runs one too (jax 0.10.2, five times of five). Starts jax's backend.
    """
    warnings.filterwarnings("ignore", message=".*Multiple temp buffer allocations")
    chosen = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]  # jax makes its settings as it is loaded
    if chosen or (jax.default_backend() == "cpu" and jax.local_device_count() > 1):
        return
    directory = files.cache_directory() / "xla"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    jax.config.update("jax_compilation_cache_dir", str(directory))
