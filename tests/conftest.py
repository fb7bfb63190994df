"""Set-up for every test, before jax or torch is first imported: eight small CPU devices, one thread, checked shapes."""

import os
from pathlib import Path

CACHE = Path(__file__).resolve().parents[1] / ".cache"

# Eight virtual devices on two cores are slow to meet in a collective: the default patience would end the process.
FLAGS = {
    "xla_force_host_platform_device_count": 8,
    "xla_cpu_collective_call_warn_stuck_timeout_seconds": 120,
    "xla_cpu_collective_call_terminate_timeout_seconds": 600,
    "xla_cpu_collective_timeout_seconds": 600,
}
os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), *(f"--{name}={value}" for name, value in FLAGS.items())]
).strip()
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
# Subprocesses of tests read these too; jax's own variables rather than its config, for the same reason.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

# A step for eight CPU devices that XLA loads from the cache can wait for ever in a collective where two processes run
# such steps at once; one that is compiled does not (seen on jax 0.10.2). Each run of the tests compiles its own.
if "PYTEST_XDIST_WORKER" not in os.environ:
    for _kept in (CACHE / "xla").glob("jit_step-*"):
        _kept.unlink(missing_ok=True)

from jaxtyping import install_import_hook  # noqa: E402

install_import_hook("latent_jax", "typechecker.checked")
