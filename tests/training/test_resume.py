"""A run that is started again over what lies in its workdir: damaged, changed, finished, or held by another."""

import dataclasses
import shutil
from pathlib import Path
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest

from latent_jax import train
from latent_jax.analysis import probe
from latent_jax.data import sources
from latent_jax.data.builders.build import build_scenes
from latent_jax.data.chat import Processor
from latent_jax.errors import UserError
from latent_jax.methods import pretrain
from latent_jax.models import sums
from latent_jax.models.heads import LatentVLM
from latent_jax.runtime import lock, provenance
from latent_jax.training import finish
from latent_jax.training.resume import check_start
from latent_jax.training.state import TrainState
from tests.reference import small, untimed


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    directory = tmp_path_factory.mktemp("resume") / "prepared"
    build_scenes(directory, sizes={"train": 40, "validation": 4})
    return directory


def config_of(scenes, **train_settings):
    return small.config(
        data=dict(path=str(scenes), image_patches=0, sample=16),
        mesh=dict(replica=2, fsdp=4),
        train=dict(steps=4, schedule="constant", **train_settings),
        checkpoint=dict(every=1, keep=0, export=False),
        evaluate=dict(split="test"),
    )


@pytest.fixture(scope="module")
def whole(scenes, tmp_path_factory):
    """A finished run of four steps with a checkpoint after each."""
    directory = tmp_path_factory.mktemp("resume") / "run"
    train.run(config_of(scenes), directory)
    return directory


@pytest.fixture
def stopped(whole, tmp_path):
    """The same run, as it was after step 3."""
    directory = tmp_path / "run"
    shutil.copytree(whole, directory)
    shutil.rmtree(directory / "checkpoints" / "4")
    (directory / finish.FINISHED).unlink()
    return directory


def flip(folder, at=0.5):
    """Flips one bit in the largest file of a folder."""
    file = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[int(len(content) * at)] ^= 4
    file.write_bytes(bytes(content))


@pytest.mark.parametrize("item", ["trainable", "frozen", "opt_state"])
def test_one_flipped_bit_is_told_with_the_newest_whole_step_and_fallen_back_from(item, stopped, whole, scenes):
    flip(stopped / "checkpoints" / "3" / item)
    with pytest.raises(UserError) as told:
        train.run(config_of(scenes), stopped)
    assert f"checkpoints/3/{item}: " in str(told.value) and "newest whole checkpoint is of step 2" in str(told.value)
    assert (stopped / "checkpoints" / "3").exists()  # nothing is touched until it is asked for
    if item == "trainable":
        config = config_of(scenes)
        config = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, fallback=True))
        train.run(config, stopped)
        assert untimed.metrics(stopped) == untimed.metrics(whole)
        assert [path.name for path in (stopped / "damaged_checkpoints").iterdir()] == ["3"]


@pytest.mark.parametrize("name", ["iterator", "extra"])
def test_a_changed_document_of_a_checkpoint_is_told(name, stopped, scenes):
    file = stopped / "checkpoints" / "3" / name / "metadata"
    text = file.read_text()
    digit = next(at for at, letter in enumerate(text) if letter.isdigit())
    file.write_text(text[:digit] + str((int(text[digit]) + 1) % 10) + text[digit + 1 :])
    with pytest.raises(UserError, match=f"checkpoints/3/{name}/metadata: is not what was saved"):
        train.run(config_of(scenes), stopped)


def test_where_no_checkpoint_is_whole_that_is_said(stopped, scenes):
    for step in (1, 2, 3):
        shutil.rmtree(stopped / "checkpoints" / str(step) / "trainable")
    with pytest.raises(UserError, match="No other checkpoint is whole: remove .*checkpoints to begin again"):
        train.run(config_of(scenes), stopped)


def test_changed_metrics_are_told_and_missing_ones_are_done_without(stopped, whole, scenes):
    file = stopped / "metrics.jsonl"
    text = file.read_text()
    file.write_text(text.replace('"examples": ', '"examples": 1', 1))
    with pytest.raises(UserError, match="metrics.jsonl: its lines up to step 3 are not those that the run wrote"):
        train.run(config_of(scenes), stopped)
    file.unlink()
    train.run(config_of(scenes), stopped)
    assert untimed.metrics(stopped) == untimed.metrics(whole)[3:]


def test_another_dataset_at_the_same_place_is_refused(stopped, scenes, tmp_path):
    other = tmp_path / "data"
    build_scenes(other, sizes={"train": 41, "validation": 4})
    here = stopped.parent / "prepared"
    shutil.copytree(scenes, here)
    directory = stopped.parent / "fresh"
    config = config_of(here)
    train.run(dataclasses.replace(config, train=dataclasses.replace(config.train, steps=1)), directory)
    shutil.rmtree(here)
    shutil.move(other, here)
    with pytest.raises(UserError, match=f"{directory}: was begun with other data: the records of scenes in {here} has"):
        train.run(config, directory)


def test_other_versions_are_told(monkeypatch):
    found = {"versions": {"jax": "0.9.0", "numpy": provenance.versions()["numpy"]}, "git_commit": None}
    (line,) = provenance.changes(found)
    assert line.startswith(f"not as this run began: jax 0.9.0 -> {provenance.versions()['jax']};")
    assert provenance.changes({"versions": provenance.versions(), "git_commit": provenance.git_commit()}) == []


def test_fewer_steps_than_are_done_are_refused_and_change_nothing(whole, scenes):
    config, before = config_of(scenes), (whole / "config.json").read_bytes()
    with pytest.raises(UserError, match=r"config.train.steps: got 2, but .* holds a checkpoint of step 4"):
        train.run(dataclasses.replace(config, train=dataclasses.replace(config.train, steps=2)), whole)
    assert (whole / "config.json").read_bytes() == before


def test_another_config_is_refused_before_anything_is_made_for_it(whole, scenes, tmp_path):
    config = config_of(scenes)
    data = dataclasses.replace(config.data, latent_cache=str(tmp_path / "cache"))
    with pytest.raises(UserError, match="begun with another config: config.data.latent_cache"):
        train.run(dataclasses.replace(config, data=data), whole)
    assert not (tmp_path / "cache").exists()


def test_a_finished_run_is_not_done_again_and_a_damaged_note_of_it_is_no_harm(whole, scenes, monkeypatch):
    (whole / finish.FINISHED).write_text("{")
    assert train.run(config_of(scenes), whole).step == 4
    monkeypatch.setattr(train, "make_step", None)
    monkeypatch.setattr(train, "restore", None)
    assert train.run(config_of(scenes), whole).step == 4


def test_a_finished_run_whose_last_checkpoint_is_damaged_falls_back(whole, scenes, tmp_path):
    directory, config = tmp_path / "run", config_of(scenes)
    shutil.copytree(whole, directory)
    (directory / "checkpoints" / "4" / "extra" / "metadata").write_text("{")
    with pytest.raises(UserError, match="checkpoints/4/extra/metadata: .*The newest whole checkpoint is of step 3"):
        train.run(config, directory)
    config = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, fallback=True))
    assert train.run(config, directory).step == 4
    assert untimed.metrics(directory) == untimed.metrics(whole)


def test_checkpoints_without_their_config_are_not_gone_on_with(stopped, scenes):
    """With other settings nobody would have noticed."""
    (stopped / "config.json").unlink()
    with pytest.raises(UserError, match="run: has checkpoints and no config.json that says what they were trained"):
        train.run(config_of(scenes, learning_rate=0.5), stopped)
    assert not (stopped / "config.json").exists()


def test_the_checkpoint_of_another_run_is_told_even_with_its_metrics(stopped, whole, scenes, tmp_path):
    train.run(config_of(scenes, learning_rate=0.5), tmp_path / "other")
    shutil.rmtree(stopped / "checkpoints")
    shutil.copytree(tmp_path / "other" / "checkpoints", stopped / "checkpoints")
    shutil.copy(tmp_path / "other" / "metrics.jsonl", stopped / "metrics.jsonl")
    with pytest.raises(UserError, match="checkpoints/4/extra/metadata: was saved by another run.*No other checkpoint"):
        train.run(config_of(scenes), stopped)


def test_an_export_whose_weights_are_gone_is_not_finished(tmp_path):
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text("weights")
    assert not sums.complete(folder)  # nothing says what was written
    sums.write(folder, {"model.safetensors": {"header": "", "tensors": {}}})
    assert sums.complete(folder)
    (folder / "model.safetensors").unlink()
    assert not sums.complete(folder)


def test_a_finished_run_whose_metrics_were_changed_says_so(whole, scenes, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(whole, directory)
    file = directory / "metrics.jsonl"
    file.write_text(file.read_text().replace('"examples": ', '"examples": 1', 1))
    with pytest.raises(UserError, match="metrics.jsonl: its lines up to step 4 are not those"):
        train.run(config_of(scenes), directory)


def test_a_second_writer_is_refused_before_anything_is_read(whole, scenes):
    with lock.only_writer(whole), pytest.raises(UserError, match="another process writes to it"):
        train.run(config_of(scenes), whole)


def test_weights_that_are_not_finite_are_not_begun_with(scenes, tmp_path, monkeypatch):
    first = train.first_state

    def broken(setup, origin, head):
        state = first(setup, origin)
        path = "vlm.text.norm"
        return state._replace(trainable={**state.trainable, path: state.trainable[path].at[3].set(jnp.nan)})

    monkeypatch.setattr(train, "first_state", broken)
    with pytest.raises(UserError, match="vlm.text.norm is not finite .* before the first step"):
        train.run(config_of(scenes), tmp_path / "run")
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_of_a_weight_and_the_statistics_that_it_spoils_the_weight_is_named(scenes):
    """head.mean stands in no file of the model."""
    bad = jnp.array([1.0, jnp.inf])
    frozen = {"head.mean": bad, "vlm.visual.patch_embed": bad}
    state = TrainState(step=jnp.zeros((), jnp.int32), trainable={"head.fc1": bad}, opt_state=(), frozen=frozen)
    with pytest.raises(UserError, match="^random weights: vlm.visual.patch_embed is not finite"):
        check_start(state, config_of(scenes), Path("hf"))


def test_a_gradient_that_is_not_finite_saves_nothing(scenes, tmp_path):
    with pytest.raises(UserError, match="is not finite|norm of the gradient is|the loss is"):
        train.run(config_of(scenes, learning_rate=1e30, clip=0.0), tmp_path / "run")
    saved = [path for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdigit()]
    for step in saved:
        with train.Checkpoints(step.parent, read_only=True) as checkpoints:
            arrays = checkpoints.restore_item(int(step.name), "trainable")
        assert all(np.isfinite(array).all() for array in arrays.values())


def test_a_missing_held_out_split_is_told_once_at_the_start(scenes, tmp_path):
    config = config_of(scenes)
    config = dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, split="dev"))
    (line,) = finish.look_ahead(config, pretrain.METHOD, tmp_path)
    assert line.startswith("no report on held-out data: scenes in ") and "has no split 'dev'" in line
    assert "config.data.holdout=N keeps N records of the training split for it" in line
    said, model, processor = [], mock.Mock(spec=LatentVLM), mock.Mock(spec=Processor)
    assert probe.run(model, config, processor, tmp_path, said.append) == {} and not said


def test_what_is_trained_on_is_not_reported_as_held_out(scenes):
    config = config_of(scenes)
    config = dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, split="train"))
    assert probe.lacking(config).startswith("config.evaluate.split: 'train' is what the run trains on; config.data")
    held = dataclasses.replace(config, data=dataclasses.replace(config.data, holdout=5))
    assert probe.lacking(held) == ""


@pytest.mark.parametrize("name", [finish.FINISHED, "imagination.json", "curves.png", "neighbours.png"])
def test_a_folder_in_the_place_of_the_last_files_is_told_before_step_one(name, scenes, tmp_path):
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f"{name}: a directory; expected a file of an earlier run, or nothing"):
        finish.look_ahead(config_of(scenes), pretrain.METHOD, tmp_path)


def test_a_damaged_held_out_split_ends_the_run_before_it_counts_as_finished(scenes, tmp_path, monkeypatch):
    def damaged(config):
        raise sources.Damaged("shard: damaged: record 0")

    monkeypatch.setattr(probe, "lacking", lambda config: "")
    monkeypatch.setattr(probe, "held_out", damaged)
    model, processor = mock.Mock(spec=LatentVLM), mock.Mock(spec=Processor)
    with pytest.raises(UserError, match="shard: damaged: record 0.*the same command makes the report"):
        probe.run(model, config_of(scenes), processor, tmp_path, print)


def test_held_out_records_are_not_trained_on(scenes):
    config = config_of(scenes)
    data = dataclasses.replace(config.data, holdout=7)
    ((source, _),) = train.open_data(dataclasses.replace(config, data=data), "train")
    ((every, _),) = train.open_data(config, "train")
    kept = {record["key"] for record in source}
    assert len(kept) == len(source) == len(every) - 7
    held = probe.held_out(dataclasses.replace(config, data=data))
    assert {record["key"] for record in held} == {record["key"] for record in every} - kept
    data = dataclasses.replace(config.data, holdout=40)
    with pytest.raises(UserError, match="config.data.holdout: got 40, expected fewer than the 40 records"):
        train.open_data(dataclasses.replace(config, data=data), "train")
