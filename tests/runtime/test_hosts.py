"""What one process can know of several: when it joins others, its share of a batch, and who speaks when it dies.

What takes several processes is tested in tests/test_hosts.py."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from latent_jax.config import schema
from latent_jax.config.training import Hosts
from latent_jax.errors import UserError
from latent_jax.runtime import hosts, sharding

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("environment", "settings", "joins"),
    [
        ({}, {}, False),
        ({"SLURM_STEP_NUM_TASKS": "1"}, {}, False),
        ({"SLURM_NTASKS": "4"}, {}, False),  # in a batch script, before srun
        ({"SLURM_STEP_NUM_TASKS": "2"}, {}, True),
        ({"SLURM_STEP_NUM_TASKS": "2"}, {"cluster": "none"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "3"}, {}, True),
        ({"TPU_WORKER_HOSTNAMES": "a"}, {}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, {}, True),
        ({}, {"cluster": "tpu"}, True),
        ({}, {"coordinator": "a:1", "count": 2, "index": 0}, True),
    ],
)
def test_a_process_joins_others_where_there_are_some(environment, settings, joins, monkeypatch):
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "MEGASCALE_NUM_SLICES", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert hosts._several(Hosts(**settings)) == joins


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(coordinator="a:1", count=2, index=2), "config.hosts.index: got 2 of config.hosts.count = 2, expected"),
        (dict(coordinator="a:1"), "config.hosts.index: got -1 of config.hosts.count = 0"),
        (dict(coordinator="a", count=1, index=0), "config.hosts.coordinator: got 'a', expected ADDRESS:PORT"),
    ],
)
def test_settings_that_cannot_be_meant(settings, message):
    config = schema.default()
    config.hosts.update(settings)
    with pytest.raises(UserError, match=re.escape(message)):
        schema.resolve(config)


@pytest.mark.parametrize("cluster", ["slurm", "ompi", "mpi4py"])
def test_a_cluster_whose_launcher_started_nothing_is_one_line(cluster, monkeypatch):
    for name in [name for name in os.environ if name.startswith(("SLURM_", "OMPI_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setitem(sys.modules, "mpi4py", None)  # as where it is not installed
    monkeypatch.setattr("jax._src.xla_bridge.backends_are_initialized", lambda: False)  # as where a command begins
    with pytest.raises(UserError, match=f"config.hosts.cluster: got '{cluster}', but .* launcher") as raised:
        hosts._initialise(Hosts(cluster=cluster, start_timeout=5))
    assert "\n" not in str(raised.value)


def test_a_count_of_tasks_that_is_none_is_named(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2(x3)")
    with pytest.raises(UserError, match=r"SLURM_STEP_NUM_TASKS: got '2\(x3\)'"):
        hosts._several(Hosts())


def test_another_mesh_and_other_hosts_may_resume():
    config = schema.default()
    old = schema.resolve(config)
    config.mesh.update(fsdp=4, cpu_devices=4)
    config.hosts.update(coordinator="a:1", count=2, index=1, timeout=20)
    assert schema.check_resume(old, schema.resolve(config)) == []


def test_alone_everything_is_its_own():
    with hosts.joined(Hosts(cluster="none")):
        pass
    assert hosts.primary()
    assert hosts.summed({"tokens": 2**40 + 1, "pairs": 0.5})() == {"tokens": 2**40 + 1, "pairs": 0.5}
    mesh = sharding.make_mesh(2, 2, 2, jax.devices()[:8])
    assert hosts.own_groups(mesh, 8) == list(range(8))
    batch = {"tokens": np.arange(48).reshape(2, 8, 3)}
    placed = hosts.place(batch, mesh, 8)["tokens"]
    np.testing.assert_array_equal(placed, batch["tokens"])
    assert placed.sharding == sharding.batch_sharding(mesh)


def test_a_workdir_that_is_not_shared_is_named(tmp_path):
    (tmp_path / "there").touch()
    hosts.expect_shared(tmp_path / "there")
    with pytest.raises(UserError, match="absent: host 0 wrote it, and it is not here; expected a --workdir that all"):
        hosts.expect_shared(tmp_path / "absent", patience=0.1)


SPEAKS = """
import os, sys, time
from latent_jax.runtime.hosts import _Herald
herald = _Herald("it ended; 100 % sure")
if sys.argv[1] == "dismissed":
    herald.dismiss()
print("ready", flush=True)
time.sleep(60 if sys.argv[1] == "killed" else 0)
os.abort() if sys.argv[1] == "aborted" else os._exit(0)
"""


@pytest.mark.parametrize("way", ["killed", "aborted", "dismissed"])
def test_a_process_that_cannot_speak_is_spoken_for(way, tmp_path):
    said = tmp_path / "said"
    with said.open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", SPEAKS, way], cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True
        )
    assert process.stdout.readline() == "ready\n"
    if way == "killed":
        os.kill(process.pid, signal.SIGKILL)
    process.wait(60)
    patience = time.monotonic() + (1 if way == "dismissed" else 20)
    while not said.read_text() and time.monotonic() < patience:
        time.sleep(0.05)
    assert said.read_text() == ("" if way == "dismissed" else "it ended; 100 % sure\n")


def test_a_lost_host_is_recognised_in_what_jax_raises():
    speaks = hosts._speaks_of_a_lost_host
    assert speaks(ValueError("UNKNOWN: Gloo AllGather failed: Connection reset by peer"))
    assert speaks(jax.errors.JaxRuntimeError("INTERNAL: NCCL operation failed"))
    assert not speaks(ValueError("zip() argument 2 is shorter")) and not speaks(KeyError("tokens"))
