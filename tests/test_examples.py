"""The examples, and the modules that CONTRIBUTING.md shows, run as they are written: few records, few steps."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

import latent_jax
from latent_jax import evaluate
from latent_jax.config import schema
from latent_jax.data import sources
from latent_jax.data.builders import build as builds
from latent_jax.data.builders.build import build_scenes
from latent_jax.errors import UserError
from latent_jax.models import hf_export
from tests.data.builders.official import picture

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
        f"--config.data.path={scenes}", "--config.data.sample=16", "--config.train.steps=3",
        "--config.chat.questions=2", "--config.train.batch_size=4", "--config.log.tensorboard=false",
    )  # fmt: skip
    return directory


def test_a_method_of_ones_own_trains_and_exports(paused):
    lines = [json.loads(line) for line in (paused / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3] and all(np.isfinite(line["loss/next_token"]) for line in lines)
    tensors, settings = hf_export.load_latent(paused / "hf")
    assert settings["method"] == "examples.own_method" and settings["pause"] == {"count": 3}
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        "embeddings": (3, 128)
    }  # D of the embedded model


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
    with pytest.raises(UserError, match=r"config\.pause\.count: got 0, expected .*1"):
        schema.override(config, [("pause.count", "0")])


def test_words_and_the_pictures_nearest_to_them(scenes, tmp_path, capsys):
    """Makes a short run itself; a second call takes the one that is there."""
    command = [
        "examples/imagine_and_look.py", f"--workdir={tmp_path / 'run'}", "--steps=2", f"--data={scenes}",
        "--pictures=8", "--words=large red cube top left.", f"--output={tmp_path / 'look.png'}",
    ]  # fmt: skip
    said = ended(*command)
    assert said.count("picture is nearest") == 3 and "picture: " in said
    image = matplotlib.image.imread(tmp_path / "look.png")
    assert min(image.shape[:2]) > 500 and image[..., :3].std() > 0.05
    made = (tmp_path / "run" / "metrics.jsonl").read_text()
    load("imagine_and_look").main(command[1:])
    assert made.count("\n") == 2 and capsys.readouterr().out == said
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


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--pictures=3"], "error: --pictures=3: expected at least 4"),
        (["--steps=many"], "error: argument --steps: invalid int value: 'many'"),
        (["--pictures=4"], "has no latent head"),  # of a workdir that has another method's head, or none
    ],
)
def test_what_cannot_be_looked_at_is_one_line(flags, message, scenes, tmp_path, capsys, monkeypatch):
    example = load("imagine_and_look")
    monkeypatch.setattr(example, "is_workdir", lambda path: True)
    monkeypatch.setattr(latent_jax, "load", lambda path, load=latent_jax.load: load(""))
    with pytest.raises(SystemExit) as ended:
        example.main([*flags, f"--data={scenes}", f"--workdir={tmp_path}", f"--output={tmp_path / 'look.png'}"])
    assert ended.value.code == 2 and message in (said := capsys.readouterr().err)
    assert said.count("\n") == 1 and not (tmp_path / "look.png").exists()


# ---------------------------------------------------------------- CONTRIBUTING.md


@pytest.fixture
def shown(monkeypatch):
    """The benchmark and the builder that CONTRIBUTING.md shows, as modules of the package."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    found = {}
    for path, code in re.findall(r"```python\n# latent_jax/(\S+)\.py\n(.*?)```", text, re.DOTALL):
        name = "latent_jax." + path.replace("/", ".")
        module = types.ModuleType(name)
        exec(compile(code, f"CONTRIBUTING.md: {path}", "exec"), module.__dict__)
        monkeypatch.setitem(sys.modules, name, module)
        found[path] = module
    monkeypatch.setitem(builds.BUILDERS, "one_word", "OneWord")
    monkeypatch.setitem(sources.BUILDER_OF, "one_word", "one_word")
    return found


def official(folder: Path, lines: list[dict | str]) -> Path:
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.jpg").write_bytes(picture(number))
    text = "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines)
    (folder / "questions.jsonl").write_text(text)
    return folder


def entry(number: int, **changes) -> dict:
    return {"question": f"Which colour has thing {number}?", "answer": "Red", "image": f"{number}.jpg"} | changes


def test_the_dataset_and_the_benchmark_of_contributing(shown, tmp_path, monkeypatch):
    raw = official(tmp_path / "raw", [entry(0), entry(1), entry(2, answer="blue")])
    assert not [line for line in builds.build("one_word", raw, tmp_path / "data") if "skipped" in line]
    records = list(sources.open_source("one_word", str(tmp_path / "data"), "test"))
    assert [record["questions"][0]["answer"] for record in records] == ["Red", "Red", "blue"]

    monkeypatch.setattr("latent_jax.config.evaluation.benchmarks", lambda: ["one_word"])
    config = schema.default_evaluation()
    config.benchmark, config.data.path, config.log.progress = "one_word", str(tmp_path / "data"), False
    replies = iter(["Red.", "a red one", "BLUE"])
    said = lambda conversations, limit: [next(replies) for _ in conversations]  # noqa: E731
    backend = evaluate.Backend(said, {"min_pixels": 1, "max_pixels": 10**6})
    found = evaluate.run(schema.resolve(config), tmp_path / "results", lambda config: backend)
    assert found["metrics"] == {"accuracy": pytest.approx(200 / 3)}


def test_the_broken_records_of_that_dataset_are_counted(shown, tmp_path):
    lines = [entry(0), entry(1, answer=3), entry(2, image="absent.jpg"), "{", {"question": "?"}]
    builds.build("one_word", official(tmp_path / "raw", lines), tmp_path / "data", max_bad=1.0)
    assert len(sources.open_source("one_word", str(tmp_path / "data"), "test")) == 1
    (skipped,) = (tmp_path / "data").rglob("skipped.jsonl")
    assert len(skipped.read_text().splitlines()) == 4
    (tmp_path / "raw" / "questions.jsonl").unlink()
    with pytest.raises(UserError, match=r"raw: no questions\.jsonl here"):
        builds.build("one_word", tmp_path / "raw", tmp_path / "other")


def test_the_method_of_contributing_is_the_example_s():
    (code,) = re.findall(r"```python\n(METHOD = .*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    assert (EXAMPLES / "own_method.py").read_text().endswith(code)
