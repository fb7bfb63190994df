"""The examples run as they are written, on a few records and for a few steps."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

import latent_jax
from latent_jax.config import schema
from latent_jax.data import sources
from latent_jax.data.builders.build import build_scenes
from latent_jax.models import hf_export

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    directory = tmp_path_factory.mktemp("examples") / "prepared"
    build_scenes(directory, sizes={"train": 40, "validation": 8})
    return directory


def ended(*command: str) -> str:
    """Standard output of a command in the project's folder, as a user types it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    found = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500
    )
    assert found.returncode == 0, found.stderr[-2000:]
    return found.stdout


@pytest.fixture(scope="module")
def paused(scenes, tmp_path_factory):
    """A workdir of examples/own_method.py, trained by the command of its docstring."""
    directory = tmp_path_factory.mktemp("examples") / "pauses"
    ended(
        "-m", "latent_jax.main", "--config=examples/own_config.py", f"--workdir={directory}", "--config.pause.count=3",
        f"--config.data.path={scenes}", "--config.data.sample=16", "--config.train.steps=3", "--config.train.batch_size=4",
        "--config.chat.questions=2", "--config.log.tensorboard=false",
    )  # fmt: skip
    return directory


def test_a_method_of_ones_own_trains_and_exports(paused):
    lines = [json.loads(line) for line in (paused / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3] and all(np.isfinite(line["loss/next_token"]) for line in lines)
    tensors, settings = hf_export.load_latent(paused / "hf")
    assert settings["method"] == "examples.own_method" and settings["pause"] == {"count": 3}
    assert {name: tensor.shape for name, tensor in tensors.items()} == {"embeddings": (3, 64)}


def test_its_pauses_stand_in_a_prompt(paused):
    vlm = latent_jax.load(paused / "hf")
    text = {"type": "text", "text": "Is there a star?"}
    with_pauses = [{"role": "user", "content": [text, {"type": "imagine"}]}]
    ((thought,),) = vlm.think([with_pauses])
    np.testing.assert_array_equal(thought.inputs, vlm.model.head.embeddings[...])
    (paused_score,), (bare,) = (
        vlm.score([with_pauses], ["yes"]),
        vlm.score([[{"role": "user", "content": [text]}]], ["yes"]),
    )
    assert np.abs(paused_score - bare).max() > 1e-4
    assert vlm.generate([with_pauses], 2) == latent_jax.load(paused).generate([with_pauses], 2)


def test_its_own_setting_is_checked_as_every_other():
    config = load("own_config").get_config()
    assert schema.resolve(config).pause.count == 4
    with pytest.raises(Exception, match=r"config\.pause\.count: got 0, expected .*1"):
        schema.override(config, [("pause.count", "0")])


def test_words_and_the_pictures_nearest_to_them(scenes, tmp_path):
    """Makes a short run itself; a second call takes the one that is there."""
    command = [
        "examples/imagine_and_look.py", f"--workdir={tmp_path / 'run'}", "--steps=2", f"--data={scenes}", "--pictures=8",
        "--words=large red cube top left.", f"--output={tmp_path / 'look.png'}",
    ]  # fmt: skip
    said = ended(*command)
    assert said.count("picture is nearest") == 3 and "picture: " in said
    image = matplotlib.image.imread(tmp_path / "look.png")
    assert min(image.shape[:2]) > 500 and image[..., :3].std() > 0.05
    made = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert made.count("\n") == 2 and ended(*command) == said
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == made


def test_nearest_is_nearest(scenes):
    """A model that imagines the true latents finds every picture first, with cosine 1."""
    example, tiny = load("imagine_and_look"), latent_jax.load("")
    source = sources.open_source("scenes", str(scenes), "validation")
    records = [source[index] for index in range(len(source))]
    by_words = {record["captions"][0]: record["images"][0] for record in records}

    class Seer:
        encode_image = tiny.encode_image

        def imagine(self, words):
            return tiny.encode_image(by_words[words])

    order, cosine = example.look(Seer(), records, list(by_words))
    assert order[:, 0].tolist() == list(range(len(records)))
    np.testing.assert_allclose(cosine[:, 0], 1, atol=1e-5)
    assert (np.diff(cosine, axis=1) <= 0).all()
