"""The comparison on the embedded world: which commands it runs, what it skips, how its table counts."""

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latent_jax import main

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "experiment.py"
spec = importlib.util.spec_from_file_location("experiment", SCRIPT)
experiment = importlib.util.module_from_spec(spec)
spec.loader.exec_module(experiment)


@pytest.fixture
def ran(monkeypatch):
    """Runs nothing: checks every command's config, leaves what the real one would, and remembers its workdir."""
    commands = []

    def execute(command):
        config, directory = main.parse(command[3:])
        commands.append(directory.name)
        for name in ("imagination.json", "hf/config.json"):
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_text("{}")
        if config.job == "evaluate":
            metrics = dict.fromkeys(experiment.METRICS[config.benchmark], 50.0 + 10 * ("latent" in directory.name))
            (directory / "results.json").write_text(json.dumps({"metrics": metrics}))
        return 0

    monkeypatch.setattr(experiment, "execute", execute)
    monkeypatch.chdir(SCRIPT.parents[1])
    return commands


def test_every_arm_and_seed_is_trained_tuned_and_scored_once(ran, tmp_path, capsys):
    arguments = ["pretraining", f"--workdir={tmp_path}", "--seeds=0,1", "--set=finetune.train.steps=7"]
    experiment.main(arguments)
    assert len(ran) == len(set(ran)) == 2 * (2 + 3 + 3 * 2)
    assert sum(name.startswith("pretrain-") for name in ran) == 4
    table = (tmp_path / "table.md").read_text()
    assert "| latent less nothing | +10.0 ± 0.0 |" in table and table in capsys.readouterr().out
    experiment.main(arguments)
    assert len(ran) == 22  # all was there


def test_data_efficiency_ends_with_pictures(ran, tmp_path):
    experiment.main(["data_efficiency", f"--workdir={tmp_path}", "--seeds=0"])
    assert sum(name.startswith("finetune-") for name in ran) == 3 * len(experiment.SHARES)
    for name in ("gqa-accuracy.png", "blink-macro.png"):
        assert np.asarray(Image.open(tmp_path / name)).std() > 10


def test_without_matplotlib_the_table_is_there_and_it_is_said_first(ran, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    experiment.main(["data_efficiency", f"--workdir={tmp_path}", "--seeds=0"])
    assert (tmp_path / "table.md").exists() and not list(tmp_path.glob("*.png"))
    assert capsys.readouterr().err.startswith("no pictures: they need matplotlib")


def test_a_failed_command_ends_it(monkeypatch, tmp_path):
    monkeypatch.setattr(experiment, "execute", lambda command: 2)
    with pytest.raises(SystemExit, match="ended with 2; the next start goes on from here"):
        experiment.main(["pretraining", f"--workdir={tmp_path}"])


def test_bad_settings_are_named():
    with pytest.raises(SystemExit, match="--set=train.steps=3: expected STAGE.KEY=VALUE"):
        experiment.settings(["train.steps=3"])
    assert experiment.settings(["finetune.train.steps=3"])["finetune"] == {"train.steps": "3"}


def test_intervals_are_students():
    assert experiment.interval([50.0]) == "50.0" and math.isnan(experiment.half_width([50.0]))
    values = [50.0, 52.0, 57.0]
    half = 4.303 * np.std(values, ddof=1) / np.sqrt(3)
    assert experiment.interval(values) == f"53.0 ± {half:.1f}"
