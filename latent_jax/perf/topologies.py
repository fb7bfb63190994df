"""Machines that are not there: compile-only devices of TPU slices and GPU nodes, and what is known of them.

    devices = topologies.open_devices(topologies.parse("a100-80gb:4x8"))  # 4 hosts of 8 GPUs
    devices = topologies.open_devices(topologies.parse("v5p:2x2x2"))  # a slice of 8 chips

The compilers come from the package index (extras `tpu`, `cuda12`, `cuda13`) and need no device.
"""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import math
import os
import re
import sys
from collections.abc import Iterator

from latent_jax.errors import UserError

GIB = 2**30
# A training process on a GPU cannot have all of its memory: the CUDA context, NCCL's buffers and the libraries'
# workspaces stand beside XLA's pool, which engineering practice sets to this share (XLA_PYTHON_CLIENT_MEM_FRACTION).
GPU_POOL = 0.9


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device, from its vendor's data sheet.

    Args:
      kind: the name that jax gives it, for `flops.peak`.
      memory: its bytes; of a GPU, as the driver reports them.
      bandwidth: bytes a second of its memory.
      link: bytes a second that one device can send to the others of its host or slice (NVLink or PCIe; ICI, all links).
      network: bytes a second of one device's share of the network between hosts; 0 where a slice is all there is.
    """

    kind: str
    memory: int
    bandwidth: float
    link: float
    network: float = 0.0


# One 200 Gb/s adapter for each A100, 400 Gb/s for each H100 and H200: DGX and the clouds' 8-GPU machines. A card of a
# workstation has PCIe 4.0 x16 to its neighbours and 10 Gb/s to the next workstation.
GPUS = {
    "a100-40gb": Chip("NVIDIA A100-SXM4-40GB", 42_331_013_120, 1.555e12, 300e9, 25e9),
    "a100-80gb": Chip("NVIDIA A100-SXM4-80GB", 85_100_068_864, 2.039e12, 300e9, 25e9),
    "h100-80gb": Chip("NVIDIA H100 80GB HBM3", 84_978_434_048, 3.352e12, 450e9, 50e9),
    "h200-141gb": Chip("NVIDIA H200", 151_397_597_184, 4.8e12, 450e9, 50e9),
    "rtx4090-24gb": Chip("NVIDIA GeForce RTX 4090", 25_757_220_864, 1.008e12, 32e9, 1.25e9),
}
TPUS = {
    "v4": Chip("TPU v4", 32 * GIB, 1.2288e12, 300e9),
    "v5e": Chip("TPU v5 lite", 16 * GIB, 0.819e12, 200e9),
    "v5p": Chip("TPU v5", 95 * GIB, 2.765e12, 600e9),
    "v6e": Chip("TPU v6 lite", 32 * GIB, 1.64e12, 448e9),
}
EXAMPLES = "a100-80gb:8, a100-80gb:4x8 (hosts x GPUs), v5p:2x2x2, v5e:4x4"


@dataclasses.dataclass(frozen=True)
class Topology:
    """A parsed name: which chip, and how many of them in which arrangement."""

    name: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def gpu(self) -> bool:
        return self.name.partition(":")[0] in GPUS

    @property
    def devices(self) -> int:
        return math.prod(self.shape)

    @property
    def memory(self) -> int:
        """Bytes that a compiled program may take of one device. A TPU's compiler keeps what it needs for itself."""
        return int(self.chip.memory * GPU_POOL) if self.gpu else self.chip.memory

    @property
    def per_host(self) -> int:
        """Devices that reach each other without the network: a GPU host's, all of a TPU slice."""
        return self.shape[-1] if self.gpu else self.devices

    def times(self, factor: int) -> "Topology":
        """A larger machine of the same kind: whole hosts more, or the slice grown along its shortest side."""
        family = self.name.partition(":")[0]
        if self.gpu:
            inside = math.gcd(factor, 8 // self.shape[1])  # a host is filled first
            shape: tuple[int, ...] = (self.shape[0] * (factor // inside), self.shape[1] * inside)
            shape = shape[1:] if shape[0] == 1 else shape
        else:
            sides = list(self.shape)
            while factor > 1:
                sides[sides.index(min(sides))] *= 2
                factor //= 2
            shape = tuple(sides)
        return parse(f"{family}:{'x'.join(map(str, shape))}")


def parse(name: str) -> Topology:
    """`CHIP:SHAPE` as in EXAMPLES. Raises UserError naming what was expected."""
    family, _, text = name.partition(":")
    if family not in GPUS | TPUS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){0,2}", text):
        raise UserError(f"--topology={name}: expected one of {', '.join(GPUS | TPUS)} with a shape, as in {EXAMPLES}")
    shape = tuple(map(int, text.split("x")))
    if family in GPUS:
        if len(shape) > 2 or shape[-1] > 8:
            raise UserError(f"--topology={name}: expected GPUs (1 to 8) or hosts x GPUs, as in a100-80gb:4x8")
        return Topology(name, GPUS[family], (1, *shape)[-2:])
    wanted = 2 if family in ("v5e", "v6e") else 3
    if len(shape) != wanted:
        example = {2: "4x4", 3: "2x2x2"}[wanted]
        raise UserError(f"--topology={name}: a {family} slice has {wanted} sides, as in {family}:{example}")
    return Topology(name, TPUS[family], shape)


def compiler(topology: Topology) -> str:
    """The packages that compile for this topology, with their versions."""
    names = ("jax", "jax-cuda12-plugin", "jax-cuda13-plugin") if topology.gpu else ("jax", "libtpu")
    installed = {each.name: each.version for each in importlib.metadata.distributions() if each.name in names}
    return ", ".join(f"{name} {installed[name]}" for name in names if name in installed)


def plugin(name: str) -> str | None:
    """What must be installed for this topology's compiler, or None where it is."""
    if name.partition(":")[0] in TPUS:
        return None if importlib.util.find_spec("libtpu") else "libtpu (pip install -c constraints.txt -e '.[tpu]')"
    found = any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))
    return None if found else "jax's CUDA plugin (pip install -c constraints.txt -e '.[cuda12]')"


def start() -> None:
    """Starts jax for compiling only, on the CPU; must come before anything else starts it in this process."""
    prepare_environment()
    with _quiet():
        import jax

        jax.devices()


def prepare_environment() -> None:
    """Sets what must stand in the environment before jax is first imported: no accelerator is looked for."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # or libtpu asks a metadata server which machine this is
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # a lock for chips, and there are none
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-16")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # Autotuning runs kernels on the device; without one the compiler takes its default tiles.
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_gpu_autotune_level" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_autotune_level=0".strip()


def open_devices(topology: Topology) -> list:
    """Its compile-only devices. Raises UserError where the plugin is missing or the compiler knows no such shape."""
    if missing := plugin(topology.name):
        raise UserError(f"--topology={topology.name}: the compiler for it is not installed; it needs {missing}")
    try:
        with _quiet():
            return _describe(topology)
    except Exception as problem:  # whatever the plugin raises says in its first line what is wrong
        line = " ".join(str(problem).split("\n")[0].split())
        raise UserError(f"--topology={topology.name}: its compiler refuses it: {line}") from None


def _describe(topology: Topology) -> list:
    from jax.experimental import topologies

    if topology.gpu:
        options = dict(topology="1x{}x{}".format(*topology.shape), target_config=target_config(topology.chip))
        return topologies.get_topology_desc(platform="cuda", topology_name="", **options).devices
    # v4 and v5p chips show their two cores as one device, as they do on the real machines.
    chosen = {"chip_config_name": "megacore"} if len(topology.shape) == 3 else {}
    bounds = {"chips_per_host_bounds": (topology.shape + (1,))[:3]} if topology.devices < 4 else {}  # less than a host
    return topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **chosen, **bounds).devices


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Discards standard error, also that of C++: the plugins warn of absent drivers, which are not needed here."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


@dataclasses.dataclass(frozen=True)
class Cores:
    """What the compiler asks of a kind of GPU. Of a core: arithmetic units, most threads, KiB of shared memory; of all:
    MiB of second-level cache, GHz."""

    capability: tuple[int, int]
    count: int
    units: int
    threads: int
    shared: int
    cache: int
    clock: float


_H100 = Cores((9, 0), 132, 128, 2048, 228, 50, 1.98)
_CORES = {
    "A100": Cores((8, 0), 108, 64, 2048, 164, 40, 1.41),
    "H100": _H100,
    "H200": _H100,
    "RTX 4090": Cores((8, 9), 128, 128, 1536, 100, 72, 2.52),
}


def target_config(chip: Chip) -> str:
    """The compiler's description of a GPU (stream_executor.GpuTargetConfigProto, as text)."""
    cores = next(cores for name, cores in _CORES.items() if name in chip.kind)
    major, minor = cores.capability
    return f"""
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  core_count: {cores.count} fpus_per_core: {cores.units} clock_rate_ghz: {cores.clock}
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: {cores.threads}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: {48 * 1024} shared_memory_per_core: {cores.shared * 1024}
  shared_memory_per_block_optin: {(cores.shared - 1) * 1024}
  block_dim_limit_x: {2**31 - 1} block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  l2_cache_size: {cores.cache * 2**20} memory_bandwidth: {int(chip.bandwidth)} device_memory_size: {chip.memory}
}}
runtime_version {{ major: 12 minor: 8 }}
dnn_version_info {{ major: 9 minor: 10 }}
platform_name: "CUDA"
device_description_str: "{chip.kind}"
"""
