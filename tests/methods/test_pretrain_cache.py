"""Pretraining from a latent cache: the numbers of a run that computes its targets, and no encoder for them."""

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from latent_jax import train
from latent_jax.config import schema
from latent_jax.data import batch_shapes, latent_cache, packing, pipeline
from latent_jax.data.builders.build import build_scenes
from latent_jax.data.chat import Processor
from latent_jax.errors import UserError
from latent_jax.methods import pretrain, sft
from latent_jax.methods.latents import targets
from latent_jax.models.qwen2_5_vl.config import from_json
from latent_jax.runtime import metrics, sharding
from latent_jax.training import shapes, state, target_cache
from tests.reference.checkpoints import saved

ROOT = Path(__file__).resolve().parents[2]
TRAIN = 40


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    directory = tmp_path_factory.mktemp("scenes") / "prepared"
    build_scenes(directory, sizes={"train": TRAIN, "validation": 4})
    return directory


@pytest.fixture(autouse=True)
def sixteen_records_a_shard(monkeypatch):
    monkeypatch.setattr(latent_cache, "_SHARD_RECORDS", 16)


@pytest.fixture
def one_device(monkeypatch):
    """Several runs in one process, and no collective among virtual devices that few cores could keep waiting."""
    made = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda *_: made(1, 1, 1, jax.devices()[:1]))


def make_config(scenes, cache="", **sections):
    """Tokens and patches are plenty, so that a step is its sixteen examples with and without a cache."""
    made = schema.default("pretrain")
    made.model.update(path=str(saved("as_published")[0]), remat="none")
    made.data.update(path=str(scenes), latent_cache=str(cache), sample=16, groups=8, rows=2, tokens=128, patches=512)
    made.latent.update(grid=3, statistics_examples=12)
    made.train.update(steps=4, batch_size=16, epsilon=1e-4)
    made.checkpoint.update(export=False)
    made.evaluate.update(split="test")  # which is not there: the report has tests of its own
    made.log.update(progress=False, tensorboard=False)
    for name, values in sections.items():
        made[name].update(values)
    return schema.resolve(made)


def losses(directory) -> list[dict]:
    lines = metrics.read(directory / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k.startswith(("loss/", "similarity/", "examples"))} for line in lines]


@pytest.mark.parametrize(("space", "replay"), [("merged", 0.25), ("encoder", 0.0)])
def test_a_run_from_a_cache_has_the_losses_of_one_that_computes_its_targets(
    scenes, tmp_path, one_device, space, replay
):
    sections = dict(latent=dict(space=space), data=dict(replay=replay))
    plain = train.run(make_config(scenes, **sections), tmp_path / "plain")
    # No room for an image where none is shown: what is left of the encoder then is nothing.
    sections["data"] |= dict(patches=0, image_patches=0)
    config = make_config(scenes, tmp_path / "cache", **sections)
    found = train.run(config, tmp_path / "cached")
    assert (found.step, found.compiles, plain.compiles) == (4, 1, 1)
    assert [line["examples"] for line in losses(tmp_path / "plain")] == [16] * 4
    for got, want in zip(losses(tmp_path / "cached"), losses(tmp_path / "plain"), strict=True):
        assert got.keys() == want.keys()
        for name, value in want.items():
            assert got[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    batch_shape = json.loads((tmp_path / "cached" / "config.json").read_text())["measured"]["budgets"]
    assert bool(batch_shape["patches"]) == (replay > 0)
    assert (batch_shape["target_slots"], batch_shape["target_dtype"]) == (9, "float32")

    # Whoever comes next finds it complete, and leaves it as it is.
    folder = tmp_path / "cache" / "scenes-train"
    assert sorted(file.name for file in folder.iterdir()) == [
        "cache.json",
        *(f"latents-0000{shard}.npy" for shard in range(3)),
    ]
    made = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    data = train.open_data(config, "train")
    [(source, _)] = caches(config).attach(data, pytest.fail)
    assert all("latents" in record for record in source)
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == made


# ---------------------------------------------------------------- the cache's own numbers


class Pictures(Sequence):
    """Records of pictures of several sizes; the third is broken, the sixth has none, the ninth is too large."""

    def __init__(self, count: int):
        self.images = []
        for index in range(count):
            rng = np.random.default_rng(index)
            size = (280, 280) if index == 8 else rng.integers(30, 100, 2)
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(buffer, "png")
            self.images.append([buffer.getvalue()])
        self.images[2], self.images[5] = [b"no image"], []

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"key": f"r{index}", "images": self.images[index], "captions": ["a red ball"], "questions": []}


def caches(config, mesh=None) -> target_cache.TargetCache:
    origin = Path(config.model.path)
    processor = Processor.from_directory(origin)
    model_config = dataclasses.replace(
        from_json(origin / "config.json"), image_mean=processor.image.mean, image_std=processor.image.std
    )
    return target_cache.TargetCache(
        config, pretrain.METHOD, processor, model_config, origin, mesh or sharding.make_mesh(2, 4, 1)
    )


def one_by_one(made: target_cache.TargetCache, source) -> dict[int, np.ndarray]:
    """Every image alone in a batch, through the whole model's encoder."""
    found = {}
    setup = state.make_setup(
        made.config, pretrain.METHOD, made.model_config, sharding.make_mesh(1, 1, 1, jax.devices()[:1]), {}
    )
    weights = state.first_state(setup, made.origin)
    model = setup.build(weights.trainable, weights.frozen)
    for index, record in enumerate(source):
        if index in (2, 5):
            continue
        example = made.processor.lay_out(pretrain.cache_layout(record, made.config))
        batch_shape = batch_shapes.choose([example], batch_size=1)
        batch = {k: jnp.asarray(v[0]) for k, v in next(packing.batches([example], batch_shape)).items()}
        options = dict(image_patches=batch_shape.image_patches)
        z = targets(made.model_config, model.vlm.encode(batch, **options), batch, made.config.latent)
        found[index] = np.asarray(z)[0, 0]
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cached_latents_are_those_of_each_image_alone(scenes, tmp_path, dtype):
    config = make_config(scenes, tmp_path, model=dict(compute_dtype=dtype), data=dict(sample=20))
    made, source = caches(config), Pictures(10)
    [(cached, weight)] = made.attach([(source, 1.0)], lambda line: None)
    assert weight == 1.0
    assert [index for index, record in enumerate(cached) if "latents" not in record] == [2, 5]
    for index, want in one_by_one(made, source).items():
        latents = cached[index]["latents"]
        assert latents.dtype.name == dtype
        # bfloat16 rounds features by 1 / 256 in every layer, in an order that the passes' shapes decide.
        tolerance = 3e-2 if dtype == "bfloat16" else 1e-5
        np.testing.assert_allclose(latents.astype(np.float32), want, atol=tolerance * np.abs(want).max())


def test_what_has_no_latents_is_skipped_and_named_as_without_a_cache(scenes, tmp_path):
    """A broken image, and one larger than those that sizes were chosen from."""
    config = make_config(scenes, tmp_path, data=dict(sample=4, replay=0.0))
    made, source = caches(config), Pictures(9)
    [(cached, _)] = made.attach([(source, 1.0)], lambda line: None)
    messages = {}
    layout = shapes.layout_of(pretrain.METHOD, config, made.processor)
    batch_shape = batch_shapes.choose(pipeline.sample_examples(cached, layout, made.processor, 4), batch_size=8)
    for index, record in enumerate(cached):
        found = pipeline._lay_out(layout, made.processor, batch_shape, False, index, record)
        if isinstance(found, pipeline._Broken):
            messages[index] = found.message
    assert list(messages) == [2, 8]
    assert messages[2] == "record 'r2': image 0: not an image in a known format (JPEG, PNG, WEBP, GIF, BMP, TIFF)"
    assert "'r8'" in messages[8]


def test_a_cache_belongs_to_its_encoder_and_its_method(scenes, tmp_path):
    config = make_config(scenes, tmp_path)
    caches(config).open("scenes", 9)
    for changes, words in (
        (dict(latent=dict(grid=2)), r"latent.grid \(3 there, 2 here\), shape"),
        (dict(latent=dict(space="encoder")), r"latent.space \(merged there, encoder here\)"),
        (dict(model=dict(path=str(saved("wide_window")[0]))), "encoder"),
        (dict(model=dict(compute_dtype="bfloat16")), r"dtype \(float32 there, bfloat16 here\)"),
    ):
        with pytest.raises(UserError, match=rf"made from something else: .*{words}"):
            caches(make_config(scenes, tmp_path, **changes)).open("scenes", 9)
    without = dataclasses.replace(caches(config), method=sft.METHOD)
    with pytest.raises(UserError, match="has no latent targets to keep"):
        without.attach([], lambda line: None)
    for changes in (dict(trainable="all"), dict(init="random")):
        with pytest.raises(UserError, match="config.data.latent_cache: got .* frozen encoder"):
            make_config(scenes, tmp_path, model=changes)


# ---------------------------------------------------------------- killed


def test_a_run_killed_while_its_cache_is_made_goes_on(scenes, tmp_path):
    """SIGKILL after the first shard: the next run keeps it, makes the rest, and trains."""
    script = (
        "import os, time; from latent_jax import main; from latent_jax.data import latent_cache as c\n"
        "c._SHARD_RECORDS = 8; write = c.LatentCache.write\n"
        "def slowly(*arguments): write(*arguments); time.sleep(float(os.environ['PAUSE']))\n"
        "c.LatentCache.write = slowly; main.main()"
    )
    settings = {
        "data.path": scenes,
        "data.latent_cache": tmp_path / "cache",
        "model.path": saved("as_published")[0],
        "mesh.cpu_devices": 1,
        "data.sample": 8,
        "latent.statistics_examples": 8,
        "train.steps": 1,
        "train.batch_size": 4,
        "checkpoint.export": "false",
        "evaluate.split": "test",
        "log.tensorboard": "false",
    }
    arguments = ["--config=configs/pretrain.py", f"--workdir={tmp_path / 'run'}"]
    arguments += [f"--config.{key}={value}" for key, value in settings.items()]

    def start(pause: str) -> subprocess.Popen:
        environment = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0", "PAUSE": pause}
        command = [sys.executable, "-c", script, *arguments]
        return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)

    first, patience = tmp_path / "cache" / "scenes-train" / "latents-00000.npy", time.monotonic() + 300
    process = start("600")
    while not first.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < patience
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = first.read_bytes()
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]  # nothing was begun
    assert len(list(first.parent.glob("latents-*.npy"))) == 1

    process = start("0")
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 0, said
    assert f"latent cache: {TRAIN - 8} of {TRAIN} images to encode" in said
    assert first.read_bytes() == kept and len(list(first.parent.glob("latents-*.npy"))) == 5
    assert [line["step"] for line in metrics.read(tmp_path / "run" / "metrics.jsonl")] == [1]
