"""Several processes as one run: two of four devices equal one of eight, end together, and go on together.

Started by launch/local.sh, each process with four virtual CPU devices and gloo between them.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from latent_jax import train
from latent_jax.config import schema
from latent_jax.data.builders.build import build_scenes
from latent_jax.models import hf_io
from latent_jax.training import workdir
from tests.reference import small, untimed

ROOT = Path(__file__).resolve().parents[1]
STEPS, MORE_STEPS, TIMEOUT = 6, 16, 10


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """A config file of the small model on eight groups."""
    directory = tmp_path_factory.mktemp("hosts")
    build_scenes(directory / "prepared", sizes={"train": 40, "validation": 4})
    config = small.config(
        data=dict(path=str(directory / "prepared"), image_patches=0, sample=40),
        train=dict(steps=STEPS),
        checkpoint=dict(every=2, keep=0),
        evaluate=dict(split="test"),  # which is not there: the report has tests of its own
        hosts=dict(timeout=TIMEOUT),
    )
    file = directory / "config.py"
    file.write_text(
        "import ml_collections\n\n\ndef get_config():\n"
        f"    return ml_collections.ConfigDict({schema.to_dict(config)!r}, type_safe=False)\n"
    )
    return config, file


class Hosts:
    """Processes started by launch/local.sh; what they say goes to a file."""

    def __init__(self, file: Path, directory: Path, count: int, devices: int):
        self.directory, self.log = directory, directory.with_suffix(".log")
        command = ["launch/local.sh", str(count), f"--config={file}", f"--workdir={directory}"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, f"--config.mesh.cpu_devices={devices}"],
                cwd=ROOT,
                env={**os.environ, "PYTHON": sys.executable, "XLA_FLAGS": "--xla_backend_optimization_level=0"},
                stdout=log,
                stderr=log,
            )

    def ended(self, patience: float = 900) -> str:
        try:
            self.process.wait(patience)
        finally:
            self.process.terminate()  # its hosts with it
        return self.log.read_text()

    def after_steps(self, count: int) -> "Hosts":
        """Waits until this start has written `count` lines."""
        patience = time.monotonic() + 900
        while True:
            # What it says first, it says with the lines of an earlier life already cut back to its checkpoint.
            resumed = re.search(r"resuming after step (\d+)|( weights trained)", self.log.read_text())
            if resumed and any(
                line["step"] >= int(resumed[1] or 0) + count for line in untimed.metrics(self.directory)
            ):
                return self
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < patience, self.log.read_text()
            time.sleep(0.01)

    def send(self, number: int, host: int) -> None:
        os.kill(int(re.search(rf"host {host}: process (\d+)", self.log.read_text())[1]), number)


def assert_same_to_rounding(left: Path, right: Path) -> None:
    """The same data in the same order, and numbers that differ by the order of their sums alone."""
    for ours, theirs in zip(untimed.metrics(left), untimed.metrics(right), strict=True):
        assert ours.keys() == theirs.keys()
        assert [ours[name] for name in ("step", "examples", "skipped")] == [
            theirs[name] for name in ("step", "examples", "skipped")
        ]
        for name in ours:
            if name != "alignment/accuracy":  # a tie may fall to either side
                assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-6), (name, ours["step"])
    got, want = workdir.Run.of(left).arrays(), workdir.Run.of(right).arrays()
    for path, array in want.items():
        np.testing.assert_allclose(got[path], array, rtol=0, atol=1e-4 * np.abs(array).max(), err_msg=path)


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory):
    """Two processes of four devices, left alone."""
    directory = tmp_path_factory.mktemp("two") / "workdir"
    hosts = Hosts(settings[1], directory, 2, 4)
    said = hosts.ended()
    assert hosts.process.returncode == 0, said
    return directory, said


def test_two_processes_of_four_devices_are_one_of_eight(settings, whole, tmp_path):
    directory, said = whole
    assert "mesh 1x8x1 (replica x fsdp x tp) of cpu on 2 hosts" in said
    assert said.count("HF checkpoint:") == 1 and said.count("no report on held-out data") == 1, "one host speaks"
    assert [line["step"] for line in untimed.metrics(directory)] == list(range(1, STEPS + 1)), "one host writes"

    alone = tmp_path / "alone"
    train.run(settings[0], alone)
    assert_same_to_rounding(directory, alone)
    exported, arrays = hf_io.load(directory / "hf", small.model_config()), workdir.Run.of(directory).arrays()
    vlm, head = workdir.split(arrays)
    assert exported.keys() == vlm.keys() and head
    for path, array in vlm.items():
        np.testing.assert_array_equal(exported[path], np.asarray(array), err_msg=path)
    assert (directory / "hf" / "latent_head.safetensors").exists()


@pytest.mark.slow
def test_hosts_end_together_and_go_on_to_the_bit(settings, tmp_path):
    whole, broken, file = tmp_path / "whole", tmp_path / "broken", tmp_path / "config.py"
    file.write_text(settings[1].read_text().replace(f"'steps': {STEPS},", f"'steps': {MORE_STEPS},"))
    hosts = Hosts(file, whole, 2, 4)
    assert "HF checkpoint:" in hosts.ended() and untimed.metrics(whole)[-1]["step"] == MORE_STEPS

    # SIGTERM at one of them: all stop after the same step.
    hosts = Hosts(file, broken, 2, 4).after_steps(1)
    hosts.send(signal.SIGTERM, 1)
    said = hosts.ended()
    assert hosts.process.returncode == 128 + signal.SIGTERM, said
    stopped = untimed.metrics(broken)[-1]["step"]
    assert stopped < MORE_STEPS and said.count(f"stopped after step {stopped};") == 1, said
    assert (broken / "checkpoints" / str(stopped)).is_dir()

    # One is killed, be it the coordinator or another: the other ends within hosts.timeout, and both are named.
    for host in (1, 0):
        hosts = Hosts(file, broken, 2, 4).after_steps(1)
        hosts.send(signal.SIGKILL, host)
        killed = time.monotonic()
        said = hosts.ended()
        took = time.monotonic() - killed
        print(f"host {host} killed: the other ended after {took:.1f} s")
        assert took < 2.5 * TIMEOUT  # with what a busy machine adds
        assert hosts.process.returncode not in (0, 2)
        assert f"host {host} of 2 ended without a word" in said
        assert re.search(rf"host {1 - host} of 2(: a computation shared by all| ended without a word)", said), said
        assert f"All hosts end within about {TIMEOUT} s" in said

    hosts = Hosts(file, broken, 2, 4)
    said = hosts.ended()
    assert hosts.process.returncode == 0 and "resuming after step" in said, said
    assert untimed.metrics(broken) == untimed.metrics(whole)
    got, want = workdir.Run.of(broken).arrays(), workdir.Run.of(whole).arrays()
    for path, array in want.items():
        np.testing.assert_array_equal(np.asarray(got[path]), np.asarray(array), err_msg=path)


@pytest.mark.slow
def test_eight_devices_on_two_hosts_resume_on_four_of_one(settings, whole, tmp_path):
    resumed = tmp_path / "resumed"
    shutil.copytree(whole[0], resumed)
    for checkpoint in (resumed / "checkpoints").iterdir():
        if int(checkpoint.name) > 2:
            shutil.rmtree(checkpoint)
    hosts = Hosts(settings[1], resumed, 1, 4)
    said = hosts.ended()
    assert hosts.process.returncode == 0 and "resuming after step 2" in said, said
    assert "the mesh changes from 1x8x1 to 1x4x1: the same data in the same order" in said
    assert_same_to_rounding(resumed, whole[0])


@pytest.mark.slow
def test_what_one_host_cannot_read_back_all_fall_back_from(settings, whole, tmp_path):
    directory = tmp_path / "workdir"
    shutil.copytree(whole[0], directory)
    (directory / "finished.json").unlink(missing_ok=True)
    # What the second process wrote, which it alone reads.
    written = directory / "checkpoints" / str(STEPS) / "trainable" / "ocdbt.process_1" / "d"
    largest = max(written.iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 4
    largest.write_bytes(bytes(content))
    file = tmp_path / "config.py"
    file.write_text(settings[1].read_text().replace("'fallback': False", "'fallback': True"))
    hosts = Hosts(file, directory, 2, 4)
    said = hosts.ended()
    assert hosts.process.returncode == 0, said
    assert f"checkpoint {STEPS} is damaged: moved into" in said and f"resuming after step {STEPS - 2}" in said
    assert untimed.metrics(directory) == untimed.metrics(whole[0])
    # Every host knows that the step has to be written again.
    got, want = workdir.Run.of(directory).arrays(STEPS), workdir.Run.of(whole[0]).arrays(STEPS)
    for path, array in want.items():
        np.testing.assert_array_equal(np.asarray(got[path]), np.asarray(array), err_msg=path)


@pytest.mark.slow
def test_all_hosts_hear_of_a_signal_also_where_every_step_is_saved(settings, tmp_path):
    file = tmp_path / "config.py"
    text = settings[1].read_text().replace(f"'steps': {STEPS},", "'steps': 100000,")
    file.write_text(text.replace("'every': 2", "'every': 1").replace("'keep': 0", "'keep': 2"))
    hosts = Hosts(file, tmp_path / "workdir", 2, 1).after_steps(1)
    hosts.send(signal.SIGTERM, 1)
    said = hosts.ended(120)
    assert hosts.process.returncode == 128 + signal.SIGTERM and "stopped after step" in said, said


@pytest.mark.slow
def test_an_error_that_all_hosts_meet_ends_them_all_with_its_line(settings, tmp_path):
    file = tmp_path / "config.py"
    file.write_text(settings[1].read_text().replace("'split': 'train'", "'split': 'absent'"))
    hosts = Hosts(file, tmp_path / "workdir", 2, 4)
    said = hosts.ended()
    assert hosts.process.returncode == 2, said
    assert all(f"error: host {host} of 2: " in said for host in (0, 1)) and "Traceback" not in said
    assert "without a word" not in said and not (tmp_path / "workdir").exists()
