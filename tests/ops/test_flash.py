"""The contract of attention: every kernel against the reference, forward and gradient, on ragged packed rows.

Splash runs in interpret mode; cuDNN's way in (padding, masks, the mesh) is taken by XLA's kernel, and its own kernel is
compiled for a GPU that is not here, where jax's plugin and cuDNN are installed. So is splash for a TPU.
"""

import functools
import importlib.util
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from latent_jax.ops import attention, flash
from latent_jax.runtime import sharding
from tests.reference.ours import QUICK

SPLASH = functools.partial(flash.splash, interpret=True)
CUDNN = functools.partial(flash.cudnn, kernel="xla")


def ragged(T: int, seed: int = 0):
    """(segments, views) of three rows: short examples, some with views, some padding; one example; padding alone."""
    rng = np.random.default_rng(seed)
    segments, views = np.zeros((3, T), np.int32), np.zeros((3, T), np.int32)
    at = segment = 0
    while (length := int(rng.integers(9, T // 3))) <= T - 5 - at:
        segment += 1
        segments[0, at : at + length] = segment
        if segment % 2:
            trunk, middle = sorted(rng.choice(np.arange(1, length), 2, replace=False))
            views[0, at + trunk : at + middle], views[0, at + middle : at + length] = 1, 2
        at += length
    assert segment >= 3
    segments[1] = 1
    return jnp.asarray(segments), jnp.asarray(views)


def check(found, wanted, *arrays, real=None):
    """Outputs and gradients of two functions of the same arrays; only `real` queries count."""
    rng = np.random.default_rng(9)
    cotangent = jnp.asarray(rng.normal(size=arrays[0].shape), jnp.float32)
    if real is not None:
        cotangent = jnp.where(real[..., None, None], cotangent, 0)

    def run(f):
        both = lambda out, back: (out, *back(cotangent))
        return jax.jit(lambda *a: both(*jax.vjp(f, *a)), compiler_options=QUICK)(*arrays)

    for name, got, want in zip(("out", "dq", "dk", "dv"), run(found), run(wanted), strict=True):
        assert np.isfinite(got).all(), name
        if name == "out" and real is not None:
            got, want = np.asarray(got)[real], np.asarray(want)[real]
        np.testing.assert_allclose(got, want, atol=1e-5 * float(np.abs(want).max()), err_msg=name)


def random(*shapes):
    rng = np.random.default_rng(3)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


@pytest.mark.parametrize("kernel", [SPLASH, CUDNN], ids=["splash", "cudnn"])
@pytest.mark.parametrize(("T", "N", "K", "H"), [(201, 4, 2, 16), (128, 3, 1, 80)])
def test_packed_rows_equal_the_reference(kernel, T, N, K, H):
    segments, views = ragged(T)
    mask = attention.packed_mask(segments, views)
    arrays = random((3, T, N, H), (3, T, K, H), (3, T, K, H))
    check(lambda *a: kernel(*a, mask), lambda *a: attention.masked_attention(*a, mask), *arrays)


def runs(P: int, block: int) -> jax.Array:
    """Two groups of ragged runs up to `block` long, each with padding behind."""
    rng = np.random.default_rng(block)
    groups = [np.repeat(np.arange(1, P + 1), rng.integers(1, block + 1, P))[: P - 9 - 20 * g] for g in range(2)]
    return jnp.asarray(np.stack([np.pad(ids, (0, P - len(ids))) for ids in groups]), jnp.int32)


@pytest.mark.parametrize(("P", "block"), [(201, 16), (201, 100)])
def test_runs_of_patches_equal_the_reference(P, block):
    ids = runs(P, block)
    arrays = random(*[(2, P, 2, 16)] * 3)
    check(
        lambda *a: flash.splash_runs(*a, ids, block, interpret=True),
        lambda *a: attention.block_attention(*a, ids, block),
        *arrays,
        real=np.asarray(ids) > 0,
    )


def test_block_attention_hands_its_blocks_to_any_kernel(monkeypatch):
    monkeypatch.setattr(flash, "cudnn", CUDNN)
    ids = runs(61, 8)
    arrays = random(*[(2, 61, 2, 16)] * 3)
    check(
        lambda *a: attention.block_attention(*a, ids, 8, "cudnn"),
        lambda *a: attention.block_attention(*a, ids, 8),
        *arrays,
        real=np.asarray(ids) > 0,
    )


@pytest.mark.parametrize("kernel", [SPLASH, CUDNN], ids=["splash", "cudnn"])
@pytest.mark.parametrize(("N", "K"), [(4, 4), (4, 1), (6, 3)], ids=["divided", "one key head", "repeated"])
def test_on_a_mesh_every_device_runs_its_own_rows_and_heads(kernel, N, K):
    mesh = sharding.make_mesh(1, 3, 2, jax.devices()[:6])
    segments, views = ragged(128)
    mask = attention.packed_mask(segments, views)
    arrays = random((3, 128, N, 16), (3, 128, K, 16), (3, 128, K, 16))

    def on_mesh(*a):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return kernel(*a, mask)

    places = [NamedSharding(mesh, P(("replica", "fsdp")))] * 3
    check(on_mesh, lambda *a: attention.masked_attention(*a, mask), *jax.device_put(arrays, places))


# ---------------------------------------------------------------- which one


def test_the_mesh_platform_chooses(monkeypatch):
    monkeypatch.setattr(flash, "cudnn_installed", lambda: True)
    choose = functools.partial(attention.choose, head_sizes=(128, 80))
    assert choose("gpu", jnp.bfloat16) == ("cudnn", "")
    assert choose("tpu", jnp.bfloat16) == choose("tpu", jnp.float32) == ("splash", "")
    assert choose("cpu", jnp.float32) == ("reference", "") and str(choose("cpu", jnp.float32)) == "reference"
    assert str(choose("gpu", jnp.float32)) == (
        "reference (cudnn computes in bfloat16 or float16, and the model in float32)"
    )
    monkeypatch.setattr(flash, "cudnn_installed", lambda: False)
    assert choose("gpu", jnp.bfloat16).reason.startswith("cuDNN is not installed")


@pytest.mark.parametrize(
    ("implementation", "platform", "dtype", "head", "problem"),
    [
        ("cudnn", "cpu", jnp.bfloat16, 64, "cudnn runs on NVIDIA GPUs, and the mesh is of platform cpu"),
        ("cudnn", "gpu", jnp.bfloat16, 84, "multiples of 8 up to 128, and a head of the model has 84"),
        ("cudnn", "gpu", jnp.bfloat16, 256, "multiples of 8 up to 128, and a head of the model has 256"),
        ("splash", "gpu", jnp.bfloat16, 64, "splash runs on TPUs, and the mesh is of platform gpu"),
    ],
)
def test_what_cannot_run_is_named(implementation, platform, dtype, head, problem):
    assert problem in attention.obstacle(implementation, platform, dtype, (head,))
    assert not attention.obstacle("reference", platform, dtype, (head,))


# ---------------------------------------------------------------- machines that are not here

A100 = """
gpu_device_info {
  cuda_compute_capability { major: 8 } core_count: 108 fpus_per_core: 64 clock_rate_ghz: 1.41
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_core: 167936 shared_memory_per_block_optin: 166912
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024 thread_dim_limit_z: 64 l2_cache_size: 41943040 memory_bandwidth: 2039000000000
  device_memory_size: 85100068864
}
runtime_version { major: 12 minor: 8 } dnn_version_info { major: 9 minor: 10 }
platform_name: "CUDA" device_description_str: "NVIDIA A100-SXM4-80GB"
"""


def compiled_for(devices, implementation: str):
    """Gradients of packed attention, and of runs of patches, for eight of these devices: (text, temporary bytes over
    those that one row's fp32 scores would take)."""
    mesh = sharding.make_mesh(1, 4, 2, devices)
    T, N, K, H, patches = 1024, 8, 4, 128, 512
    place = lambda *spec: NamedSharding(mesh, P(("replica", "fsdp"), *spec))
    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place(None, "tp"))
    ids = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=place())

    def loss(rows, images, segments, views, runs):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            out = attention.attention(*rows, attention.packed_mask(segments, views), implementation)
            seen = attention.block_attention(*images, runs, 64, implementation)
            return out.astype(jnp.float32).sum() + seen.astype(jnp.float32).sum()

    rows = array(4, T, N, H), array(4, T, K, H), array(4, T, K, H)
    images = (array(4, patches, 16, 80),) * 3
    lowered = jax.jit(jax.grad(loss, (0, 1))).lower(rows, images, ids(4, T), ids(4, T), ids(4, patches))
    program = lowered.compile()
    return program.as_text(), program.memory_analysis().temp_size_in_bytes / (N // 2 * T * T * 4)


def test_cudnn_compiles_for_gpus_that_are_not_here():
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        pytest.skip("needs jax's CUDA plugin: the extra cuda12")
    if not flash.cudnn_installed():
        pytest.skip("needs cuDNN (nvidia-cudnn-cu12)")
    os.environ["XLA_FLAGS"] += " --xla_gpu_autotune_level=0"  # tuning would run kernels
    devices = topologies.get_topology_desc("", "cuda", topology="1x1x8", target_config=A100).devices
    assert attention.choose(devices[0].platform, jnp.bfloat16, (128, 80)) == ("cudnn", "")
    text, temporaries = compiled_for(devices, "cudnn")
    assert text.count("__cudnn$fmhaScaleBiasSoftmaxBackward") == 2
    assert temporaries < 1


def test_splash_compiles_for_tpus_that_are_not_here(monkeypatch):
    if not importlib.util.find_spec("libtpu"):
        pytest.skip("needs libtpu: the extra tpu")
    for name, value in {"SKIP_MDS_QUERY": "1", "ACCELERATOR_TYPE": "v5p-16", "WORKER_HOSTNAMES": "localhost"}.items():
        monkeypatch.setenv(f"TPU_{name}", value)
    devices = topologies.get_topology_desc("v5p:2x2x2", "tpu", chip_config_name="megacore").devices
    assert attention.choose(devices[0].platform, jnp.bfloat16, (128, 80)) == ("splash", "")
    text, temporaries = compiled_for(devices, "splash")
    assert text.count("tpu_custom_call") >= 6  # forward, dq and dkv of both
    assert temporaries < 1
