"""Names of machines, and one clear line for what is none."""

import importlib.util

import pytest

from latent_jax.errors import UserError
from latent_jax.models.qwen2_5_vl import flops
from latent_jax.perf import topologies


@pytest.mark.parametrize(
    ("name", "devices", "per_host", "kind"),
    [
        ("a100-40gb:8", 8, 8, "NVIDIA A100-SXM4-40GB"),
        ("a100-80gb:1", 1, 1, "NVIDIA A100-SXM4-80GB"),
        ("a100-80gb:4x8", 32, 8, "NVIDIA A100-SXM4-80GB"),
        ("h100-80gb:8", 8, 8, "NVIDIA H100 80GB HBM3"),
        ("h200-141gb:2x4", 8, 4, "NVIDIA H200"),
        ("rtx4090-24gb:1", 1, 1, "NVIDIA GeForce RTX 4090"),
        ("v4:2x2x2", 8, 8, "TPU v4"),
        ("v5e:4x4", 16, 16, "TPU v5 lite"),
        ("v5p:2x2x4", 16, 16, "TPU v5"),
        ("v6e:4x4", 16, 16, "TPU v6 lite"),
    ],
)
def test_a_name_says_how_many_of_what(name, devices, per_host, kind):
    found = topologies.parse(name)
    assert (found.devices, found.per_host, found.chip.kind) == (devices, per_host, kind)
    assert flops.peak(kind)
    assert found.memory < found.chip.memory if found.gpu else found.memory == found.chip.memory


@pytest.mark.parametrize("name", ["", "a100:8", "a100-80gb", "a100-80gb:", "v5p:0x2x2", "v5p:2x-2", "v5e:4x4 ", "tpu"])
def test_what_is_no_topology_is_answered_with_those_that_are(name):
    with pytest.raises(UserError, match=r"--topology=.*: expected one of a100-40gb, .*, v6e with a shape"):
        topologies.parse(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a100-80gb:16", r"expected GPUs \(1 to 8\) or hosts x GPUs"),
        ("a100-80gb:2x2x2", r"expected GPUs \(1 to 8\) or hosts x GPUs"),
        ("v5e:2x2x2", "a v5e slice has 2 sides, as in v5e:4x4"),
        ("v5p:4x4", "a v5p slice has 3 sides, as in v5p:2x2x2"),
    ],
)
def test_a_shape_that_the_family_does_not_have_is_named(name, message):
    with pytest.raises(UserError, match=message):
        topologies.parse(name)


@pytest.mark.parametrize(
    ("name", "times", "larger"),
    [
        ("a100-80gb:8", 4, "a100-80gb:4x8"),
        ("a100-40gb:2", 4, "a100-40gb:8"),
        ("h200-141gb:4", 4, "h200-141gb:2x8"),
        ("v5e:4x4", 2, "v5e:8x4"),
        ("v5p:2x2x2", 4, "v5p:4x4x2"),
    ],
)
def test_a_larger_machine_of_the_same_kind(name, times, larger):
    assert topologies.parse(name).times(times).name == larger


def test_a_compiler_that_is_not_installed_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"v5e:4x4: .* not installed; it needs libtpu \(pip install -c constraints.txt -e '.\[tpu\]'"
    ):
        topologies.open_devices(topologies.parse("v5e:4x4"))
    with pytest.raises(
        UserError, match=r"a100-80gb:8: .*needs jax's CUDA plugin \(pip install -c constraints.txt -e '.\[cuda12\]'"
    ):
        topologies.open_devices(topologies.parse("a100-80gb:8"))


def test_every_gpu_is_described_to_its_compiler():
    found = {name: topologies.target_config(chip) for name, chip in topologies.GPUS.items()}
    assert "major: 8 minor: 9" in found["rtx4090-24gb"] and "core_count: 128" in found["rtx4090-24gb"]
    assert "major: 8 minor: 0" in found["a100-40gb"] and "major: 9 minor: 0" in found["h200-141gb"]
