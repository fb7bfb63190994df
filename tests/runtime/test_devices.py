"""The compile cache: on by default, elsewhere or off when told. Freed memory: kept where that is asked for."""

import subprocess
import sys

import jax
import pytest

from latent_jax.runtime import devices


@pytest.fixture
def configured(monkeypatch):
    """Gives a function that runs the set-up as if jax had no cache, and says which one it has then."""

    def enable(count=1):
        monkeypatch.setattr(jax, "local_device_count", lambda: count)
        before = jax.config.jax_compilation_cache_dir
        jax.config.update("jax_compilation_cache_dir", None)
        try:
            devices.enable_compile_cache()
            return jax.config.jax_compilation_cache_dir
        finally:
            jax.config.update("jax_compilation_cache_dir", before)

    return enable


def test_default_lies_in_the_users_cache(configured, monkeypatch, tmp_path):
    monkeypatch.delenv("LATENT_JAX_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert configured() == str(tmp_path / ".cache" / "latent_jax" / "xla")
    assert (tmp_path / ".cache" / "latent_jax" / "xla").is_dir()


def test_variable_moves_it(configured, monkeypatch, tmp_path):
    monkeypatch.setenv("LATENT_JAX_CACHE", str(tmp_path / "here"))
    assert configured() == str(tmp_path / "here" / "xla")


def test_a_directory_that_cannot_be_made_is_done_without(configured, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LATENT_JAX_CACHE", str(tmp_path / "file" / "below"))
    assert configured() is None


def test_several_devices_of_a_cpu_compile_their_own(configured, monkeypatch, tmp_path):
    """A loaded program with collectives between them may never end while another process runs one."""
    monkeypatch.setenv("LATENT_JAX_CACHE", str(tmp_path))
    assert configured(2) is None and configured(1) is not None


def test_a_cache_chosen_for_jax_stays(monkeypatch, tmp_path):
    monkeypatch.setenv("LATENT_JAX_CACHE", str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    assert before
    devices.enable_compile_cache()
    assert jax.config.jax_compilation_cache_dir == before


def test_a_second_process_finds_the_first_ones_program(tmp_path):
    code = (
        "import jax; from latent_jax.runtime.devices import enable_compile_cache\n"
        "enable_compile_cache(); jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)\n"
        "jax.jit(lambda x: x @ x + 1)(jax.numpy.ones((8, 8)))\n"
    )
    environment = {"PATH": "", "HOME": str(tmp_path), "JAX_PLATFORMS": "cpu", "PYTHONPATH": ":".join(sys.path)}
    listings = []
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code], env=environment, timeout=60, check=True)
        kept = (tmp_path / ".cache" / "latent_jax" / "xla").iterdir()
        listings.append(sorted(path.name for path in kept if path.name.endswith("-cache")))
    assert listings[0] and listings[0] == listings[1]


def faults(code: str, **environment) -> tuple[int, int]:
    """The two numbers that a process of its own prints: page faults of the first round and of later ones."""
    environment |= {"PYTHONPATH": ":".join(sys.path), "JAX_PLATFORMS": "cpu"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, timeout=120, check=True, capture_output=True)
    first, later = map(int, run.stdout.split())
    return first, later


@pytest.mark.parametrize("kept", [False, True])
def test_freed_memory_is_kept_where_asked(kept):
    # Blocks of 40 MB lie above every threshold that malloc moves by itself: written once, freed, and written again.
    code = (
        "import resource, numpy\n"
        "from latent_jax.runtime.devices import keep_freed_memory\n"
        f"if {kept}: keep_freed_memory()\n"
        "def faults():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    numpy.full(40 << 20, 1, numpy.int8)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "first, *later = [faults() for _ in range(4)]\n"
        "print(first, max(later))\n"
    )
    # numpy asks for huge pages otherwise, of which 40 MB are a handful.
    first, later = faults(code, NUMPY_MADVISE_HUGEPAGE="0")
    if not kept and later < first / 2:
        pytest.skip("this C library keeps blocks of 40 MB by itself")
    assert later < first / 100 if kept else later > first / 2


@pytest.mark.parametrize("divided", [False, True])
def test_intermediate_values_lie_in_blocks_that_are_kept(divided):
    # A backward pass over four layers of 24 MiB on each of two devices, whose programs run in threads of jax's own.
    code = (
        "import resource, jax, jax.numpy as jnp\n"
        "from jax.sharding import NamedSharding, PartitionSpec as P\n"
        "from latent_jax.runtime import devices\n"
        "devices.divide_cpu(2); devices.keep_freed_memory()\n"
        "def loss(w, x):\n"
        "    for _ in range(4): x = jnp.tanh(x @ w)\n"
        "    return x.sum()\n"
        "mesh = jax.make_mesh((2,), ('a',), axis_types=(jax.sharding.AxisType.Auto,))\n"
        "place = NamedSharding(mesh, P('a'))\n"
        f"options = devices.compiler_options('cpu') if {divided} else {{}}\n"
        "run = jax.jit(jax.grad(loss), compiler_options=options)\n"
        "w, x, faults = jnp.eye(128), jax.device_put(jnp.ones((2 * 49152, 128)), place), []\n"
        "for _ in range(5):\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    jax.block_until_ready(run(w, x))\n"
        "    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)\n"
        "print(faults[0], min(faults[1:]))\n"
    )
    first, later = faults(code, PATH="")
    if not divided and later < first / 2:
        pytest.skip("this C library keeps blocks of any size")
    assert later < first / 20 if divided else later > first / 2, (first, later)


def test_other_platforms_compile_as_they_do():
    assert devices.compiler_options("gpu") == devices.compiler_options("tpu") == {}
