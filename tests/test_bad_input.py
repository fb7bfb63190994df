"""Bad input to a training run: one clear line, and no workdir that was begun with it."""

import json
import math
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from latent_jax import train
from latent_jax.errors import UserError
from latent_jax.models import hf_export
from latent_jax.models.parameters import Structure
from latent_jax.models.qwen2_5_vl.model import Qwen2_5_VL
from latent_jax.runtime import metrics
from latent_jax.runtime.checkpoints import Checkpoints
from tests.reference import small

LONG = "a large red ball " * 40


class FakeStep:
    """Counts steps instead of training; `losses` are what it says it found, the last one again and again."""

    def __init__(self, *losses: float):
        self.losses = losses

    def __call__(self, state, batch):
        loss = self.losses[min(int(state.step), len(self.losses) - 1)]
        return state._replace(step=state.step + 1), {"loss/total": jnp.float32(loss)}

    def _cache_size(self) -> int:
        return 1


def run(config, directory, monkeypatch, records, *losses: float):
    """A run on these records, with everything real but the step."""
    monkeypatch.setattr(train, "open_data", lambda config, split: [(records, 1.0)])
    monkeypatch.setattr(train, "make_step", lambda setup: FakeStep(*losses or (1.0,)))
    monkeypatch.setattr(train, "finish", lambda *arguments: {})
    return train.run(config, directory)


def error(*arguments, **options) -> str:
    with pytest.raises(UserError) as caught:
        run(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def records(count: int, **broken: dict) -> list[dict]:
    """`broken`: r3={"captions": [...]} changes the record of that key."""
    return [small.record(index) | broken.get(f"r{index}", {}) for index in range(count)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Weights of zeros in two shards."""
    directory = tmp_path_factory.mktemp("weights") / "hf"
    structure = Structure.of(nnx.eval_shape(lambda: Qwen2_5_VL(small.model_config(), rngs=nnx.Rngs(0))))
    arrays = {path: np.zeros(variable.shape, np.float32) for path, variable in structure.variables.items()}
    hf_export.save(directory, arrays, small.model_config(), source=small.directory(), max_shard_bytes=300_000)
    return directory


@pytest.mark.parametrize("kind", ["missing", "truncated", "no weights"])
def test_a_broken_shard_is_named_before_anything_is_written(kind, checkpoint, tmp_path, monkeypatch):
    model = tmp_path / "model"
    shutil.copytree(checkpoint, model)
    shard = sorted(model.glob("*.safetensors"))[-1]
    assert "-of-" in shard.name
    if kind == "missing":
        shard.unlink()
    elif kind == "truncated":
        shard.write_bytes(shard.read_bytes()[:-1000])
    else:
        model, shard = small.directory(), small.directory()
    config = small.config(model=dict(init="checkpoint", path=str(model)))
    assert shard.name in error(config, tmp_path / "run", monkeypatch, records(20))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (dict(data=dict(groups=12), train=dict(batch_size=24)), "config.data.groups: 12 groups cannot be shared by 8"),
        (dict(mesh=dict(fsdp=1, tp=8)), "config.mesh.tp: 8 does not divide the model's 4 attention heads"),
        (dict(mesh=dict(fsdp=3)), "config.mesh: "),
        (dict(train=dict(batch_size=12)), "train.batch_size 12 must be a multiple of groups"),
    ],
)
def test_a_setting_that_does_not_fit_is_named(sections, message, tmp_path, monkeypatch):
    assert error(small.config(**sections), tmp_path / "run", monkeypatch, records(20)).startswith(message)
    assert not (tmp_path / "run").exists()


def test_a_dataset_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere/coco_captions: no prepared dataset here; make it with"):
        train.run(small.config(data=dict(path=str(tmp_path / "nowhere"))), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_broken_records_are_skipped_and_counted(tmp_path, monkeypatch):
    """An image that is none and a caption longer than the row, both also among the images that `fit` measures."""
    broken = records(40, r0={"images": [b"<html>"]}, r5={"captions": [LONG]})
    config = small.config(data=dict(tokens=64, rows=1), latent=dict(statistics_examples=40))
    assert run(config, tmp_path / "run", monkeypatch, broken).step == 5
    found = metrics.read(tmp_path / "run" / "metrics.jsonl")
    assert sum(line["examples"] for line in found) >= 60  # more than one epoch
    skipped = [line["skipped"] for line in found]
    assert skipped == sorted(skipped) and 2 <= skipped[-1] <= 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": [b"<html>"]}, "no usable record among 20: record 'r0'"),
        (
            {"captions": [LONG]},
            "config.data.tokens: got 64, expected at least 168, what the smallest sampled",
        ),
    ],
)
def test_nothing_but_broken_records_is_an_error_that_says_why(change, message, tmp_path, monkeypatch):
    broken = records(20, **{f"r{index}": change for index in range(20)})
    config = small.config(data=dict(tokens=64, rows=1))
    assert error(config, tmp_path / "run", monkeypatch, broken).startswith(message)
    assert not (tmp_path / "run" / "checkpoints" / "1").exists()


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_run_before_it_is_saved(loss, tmp_path, monkeypatch):
    config = small.config(checkpoint=dict(every=1))
    said = error(config, tmp_path / "run", monkeypatch, records(20), 1.0, 1.0, loss)
    assert said.startswith(f"step 3: the loss is {loss}; the checkpoints before it are whole. Expected a finite loss")
    assert [line["loss/total"] for line in metrics.read(tmp_path / "run" / "metrics.jsonl")] == [1.0, 1.0, None]
    with Checkpoints(tmp_path / "run" / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.steps() == [1, 2]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["train"]["steps"] == 5
