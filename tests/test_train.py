"""A run as users start it: killed and stopped and started again, it ends where a run that was left alone ends."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from latent_jax import train
from latent_jax.data.builders.build import build_scenes
from latent_jax.errors import UserError
from latent_jax.models import hf_io
from latent_jax.models.qwen2_5_vl.config import from_json
from latent_jax.runtime import metrics
from latent_jax.training import workdir
from tests.reference import small, untimed

ROOT = Path(__file__).resolve().parents[1]
STEPS = 16


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    directory = tmp_path_factory.mktemp("scenes") / "prepared"
    build_scenes(directory, sizes={"train": 40, "validation": 4})
    return directory


# ---------------------------------------------------------------- in processes of their own


def start(directory: Path, scenes: Path) -> subprocess.Popen:
    """The command, on one device."""
    settings = {
        "model.init": "random",
        "model.preset": "tiny",
        "mesh.cpu_devices": 1,
        "model.unroll": 1,
        "data.path": scenes,
        "data.sample": 16,
        "latent.statistics_examples": 8,
        "train.steps": STEPS,
        "train.batch_size": 4,
        "checkpoint.every": 2,
        "checkpoint.export": "false",
        "evaluate.split": "test",  # which is not there: the report has tests of its own
        "log.tensorboard": "false",
    }
    command = [sys.executable, "-m", "latent_jax.main", "--config=configs/pretrain.py", f"--workdir={directory}"]
    return subprocess.Popen(
        command + [f"--config.{key}={value}" for key, value in settings.items()],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process: subprocess.Popen, status: int = 0) -> str:
    """Waits for the end; what it said."""
    _, said = process.communicate(timeout=300)
    assert process.returncode == status, said
    return said


def wait_for_step(process: subprocess.Popen, directory: Path, step: int) -> None:
    file, patience = directory / "metrics.jsonl", time.monotonic() + 300
    while not (file.exists() and any(line["step"] >= step for line in metrics.read(file))):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < patience
        time.sleep(0.002)


def test_a_run_that_is_stopped_and_killed_ends_as_one_that_was_not(scenes, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finished(start(whole, scenes))
    assert [line["step"] for line in untimed.metrics(whole)] == list(range(1, STEPS + 1))

    # SIGTERM as soon as steps run: saved, and a good end, soon.
    process = start(broken, scenes)
    wait_for_step(process, broken, 1)
    asked = time.monotonic()
    process.send_signal(signal.SIGTERM)
    said = finished(process, 128 + signal.SIGTERM)
    assert time.monotonic() - asked < 10
    stopped = untimed.metrics(broken)[-1]["step"]
    assert stopped < STEPS and f"stopped after step {stopped}; the same command goes on from there" in said
    assert (broken / "checkpoints" / str(stopped)).is_dir()

    # SIGKILL wherever it happens to be.
    process = start(broken, scenes)
    at = random.randint(stopped + 1, STEPS - 2)
    wait_for_step(process, broken, at)
    time.sleep(random.uniform(0, 0.05))
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL

    said = finished(start(broken, scenes))
    assert "resuming after step" in said
    assert untimed.metrics(broken) == untimed.metrics(whole), f"killed at step {at}"
    got, want = workdir.Run.of(broken).arrays(), workdir.Run.of(whole).arrays()
    assert got.keys() == want.keys()
    for path, array in want.items():
        np.testing.assert_array_equal(np.asarray(got[path]), np.asarray(array), err_msg=f"{path}, killed at {at}")


# ---------------------------------------------------------------- in this process, on eight devices


def on_eight(scenes, **settings):
    return small.config(
        data=dict(path=str(scenes), image_patches=0, sample=32),
        mesh=dict(replica=2, fsdp=4),
        train=dict(steps=3, **settings),
        checkpoint=dict(every=2),
        evaluate=dict(split="test"),
    )


@pytest.fixture(scope="module")
def ran(scenes, tmp_path_factory):
    directory = tmp_path_factory.mktemp("run") / "workdir"
    config = on_eight(scenes)
    return config, directory, train.run(config, directory)


def test_a_whole_run_compiles_its_step_once(ran):
    _, directory, summary = ran
    assert summary == train.Summary(step=3, stopped=0, compiles=1, report={})
    assert [line["step"] for line in untimed.metrics(directory)] == [1, 2, 3]
    assert all(np.isfinite(line["loss/total"]) and line["skipped"] == 0 for line in untimed.metrics(directory))


def test_a_run_on_a_cpu_keeps_freed_memory(scenes, tmp_path, monkeypatch):
    def told():
        raise UserError("asked to keep it")

    monkeypatch.setattr(train, "keep_freed_memory", told)
    with pytest.raises(UserError, match="asked to keep it"):
        train.run(on_eight(scenes), tmp_path / "run")


def test_a_run_leaves_a_table_of_its_parameters(ran):
    _, directory, _ = ran
    table = (directory / "parameters.txt").read_text()
    assert "| trained/vlm.text.blocks.q " in table and "| frozen/vlm.vision.blocks.qkv " in table
    arrays = workdir.Run.of(directory).arrays()
    assert f"Total: {sum(array.size for array in arrays.values()):,}" in table


def test_what_a_run_leaves_is_a_plain_checkpoint_and_a_latent_head(ran):
    _, directory, _ = ran
    vlm, head = workdir.split(workdir.Run.of(directory).arrays())
    exported = hf_io.load(directory / "hf", small.model_config())
    assert exported.keys() == vlm.keys() and head
    for path, array in vlm.items():
        np.testing.assert_array_equal(exported[path], np.asarray(array), err_msg=path)
    assert {"latent_head.safetensors", "latent_config.json", "tokenizer.json"} <= {
        file.name for file in (directory / "hf").iterdir()
    }


def test_a_random_start_keeps_the_shape_that_its_preset_names(tmp_path):
    config = small.config(model=dict(init="random", preset="qwen2_5_vl_3b"))
    train.keep_origin(config, small.directory(), tmp_path)
    kept = {file.name for file in (tmp_path / "hf_files").iterdir()}
    assert kept >= {"tokenizer.json", "preprocessor_config.json"}
    assert from_json(tmp_path / "hf_files" / "config.json").text.hidden_size == 2048


def test_a_finished_run_has_nothing_left_to_do(ran):
    config, directory, _ = ran
    before = (directory / "metrics.jsonl").read_bytes()
    again = train.run(config, directory)
    assert (again.step, again.compiles) == (3, 0)
    assert (directory / "metrics.jsonl").read_bytes() == before


def test_a_resumed_run_refuses_what_changes_numbers(ran, scenes):
    _, directory, _ = ran
    before = {file: file.read_bytes() for file in directory.rglob("*") if file.is_file()}
    with pytest.raises(UserError) as caught:
        train.run(on_eight(scenes, weight_decay=0.2), directory)
    assert str(caught.value) == (
        "this workdir was begun with another config: config.train.weight_decay (0.1 -> 0.2); "
        "use the old values or a new --workdir"
    )
    assert {file: file.read_bytes() for file in directory.rglob("*") if file.is_file()} == before
