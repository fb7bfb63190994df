"""Losses on held-out data while training: the training loss over the same records, summed over all of them."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from latent_jax import train
from latent_jax.data import packing
from latent_jax.data.builders.build import build_scenes
from latent_jax.errors import UserError
from latent_jax.inference.prompts import with_images
from latent_jax.methods import pretrain
from latent_jax.models.parameters import Structure
from latent_jax.runtime import metrics
from latent_jax.runtime.checkpoints import Checkpoints
from latent_jax.training import validation
from latent_jax.training.state import new_model
from tests.reference import small
from tests.reference.ours import QUICK


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    directory = tmp_path_factory.mktemp("validation") / "prepared"
    build_scenes(directory, sizes={"train": 40, "validation": 12})
    return directory


def config_of(scenes, **evaluate):
    return small.config(
        data=dict(path=str(scenes), image_patches=0, sample=16, replay=0.5),
        mesh=dict(replica=2, fsdp=4),
        train=dict(steps=4, batch_size=16, accumulate=2),
        checkpoint=dict(every=2, keep=0, export=False),
        evaluate=dict(every=2, examples=0) | evaluate,
        log=dict(every=3),
        loss=dict(alignment_weight=0.0, similarity_schedule=((0.0, 0.0), (1.0, 1.0))),
    )


@pytest.fixture(scope="module")
def ran(scenes, tmp_path_factory):
    directory = tmp_path_factory.mktemp("validation") / "run"
    train.run(config_of(scenes), directory)
    return directory


def test_a_line_every_so_many_steps_holds_the_loss_of_all_held_out_records(ran, scenes):
    lines = {line["step"]: line for line in metrics.read(ran / "metrics.jsonl")}
    assert sorted(lines) == [2, 3, 4] and validation.LOSS not in lines[3]
    config = with_images(config_of(scenes), 1024)
    records = validation.open_records(config)
    assert len(records) == 12
    for step in (2, 4):
        with Checkpoints(ran / "checkpoints", read_only=True) as checkpoints:
            arrays = {**checkpoints.restore_item(step, "trainable"), **checkpoints.restore_item(step, "frozen")}
        want = by_hand(config, arrays, records)
        for term in ("next_token", "similarity"):
            assert lines[step][f"validation/loss/{term}"] == pytest.approx(want[term], rel=1e-4)
        total = want["next_token"] + step / 4 * want["similarity"]
        assert lines[step][validation.LOSS] == pytest.approx(total, rel=1e-4)


def by_hand(config, arrays, records) -> dict[str, float]:
    """Every record alone in a batch of one."""
    structure = Structure.of(nnx.eval_shape(lambda: new_model(config, pretrain.METHOD, small.model_config())))
    size = dict(rows=1, tokens=256, patches=1024, examples=1, slots=0, channels=588, image_patches=1024)
    model, totals = structure.build({path: jnp.asarray(array) for path, array in arrays.items()}), {}
    run = jax.jit(lambda model, batch: pretrain.loss(model, batch, config)[0], compiler_options=QUICK)
    for index, record in enumerate(records):
        packer = packing.Packer(packing.BatchShape(micro=1, groups=1, **size).with_room(pretrain.room(config)))
        packer.add(small.processor().lay_out(pretrain.layout(record, index, config, small.processor())))
        batch = {name: array[0] for name, array in packer.flush().items()}
        for term, (total, weight) in run(model, batch).items():
            before = totals.get(term, (0.0, 0.0))
            totals[term] = before[0] + float(total), before[1] + float(weight)
    return {term: total / weight for term, (total, weight) in totals.items()}


def test_a_run_that_goes_on_measures_the_same(ran, scenes, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(ran, directory)
    shutil.rmtree(directory / "checkpoints" / "4")
    (directory / "finished.json").unlink()
    train.run(config_of(scenes), directory)
    lines = [metrics.read(each / "metrics.jsonl") for each in (ran, directory)]
    held_out = [[{k: v for k, v in line.items() if k.startswith("validation/")} for line in each] for each in lines]
    assert held_out[0] == held_out[1] and held_out[0][-1]


def test_the_best_step_is_noted(ran):
    lines = metrics.read(ran / "metrics.jsonl")
    losses = {line["step"]: line[validation.LOSS] for line in lines if validation.LOSS in line}
    noted = json.loads((ran / "finished.json").read_text())["content"]["report"]
    assert noted["validation/best_step"] == min(losses, key=losses.get)
    assert noted["validation/best_loss"] == min(losses.values())
    assert validation.best([{"step": 1}]) == {}


def test_the_same_losses_on_another_mesh(ran, scenes, tmp_path):
    config = config_of(scenes)
    config = type(config)(**{**vars(config), "mesh": type(config.mesh)(replica=1, fsdp=2, tp=4)})
    train.run(config, tmp_path / "run")
    found, want = (metrics.read(each / "metrics.jsonl")[0][validation.LOSS] for each in (tmp_path / "run", ran))
    np.testing.assert_allclose(found, want, rtol=1e-4)


@pytest.mark.parametrize(
    ("evaluate", "message"),
    [(dict(split="dev"), "no split 'dev'"), (dict(split="train"), "'train' is what the run trains on")],
)
def test_a_split_that_cannot_be_held_out_is_told_before_the_run_begins(scenes, tmp_path, evaluate, message):
    with pytest.raises(UserError, match=message):
        train.run(config_of(scenes, **evaluate), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()
