"""Fine-tuning of stock models: the same losses as our own run, and every family from prepared files to results."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from latent_jax import evaluate, train
from latent_jax.config import schema
from latent_jax.data.builders.build import build_scenes
from latent_jax.errors import UserError
from latent_jax.methods import sft
from latent_jax.runtime import metrics, sharding
from latent_jax.training import shapes
from tests.reference import baselines, checkpoints, small, untimed
from third_party import backend, finetune
from third_party import steps as baseline_steps
from third_party.families import open_processor


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes") / "prepared"
    build_scenes(folder, seed=3, sizes={"train": 24, "validation": 2})
    return folder


def make_config(path, prepared="", **sections):
    config = schema.default("sft")
    config.model.path, config.data.name, config.data.path = str(path), "gqa", str(prepared)
    config.chat.questions = 2
    config.log.progress = config.log.tensorboard = False
    config.train.update(steps=3, batch_size=4, learning_rate=1e-3, warmup=0.4)
    for name, values in sections.items():
        config[name].update(values)
    return schema.resolve(config)


def lines(directory) -> list[dict]:
    return metrics.read(directory / "metrics.jsonl")


# ---------------------------------------------------------------- as our own runs


@pytest.fixture(scope="module")
def both(prepared, tmp_path_factory):
    """Five steps of ours, over more than one epoch, and of stock transformers that follow them: their workdirs."""
    ours, theirs = (tmp_path_factory.mktemp(name) / "run" for name in ("ours", "theirs"))
    defaults = ours.parent / "sft.py"
    defaults.write_text(
        "from latent_jax.config.schema import default\n\n\ndef get_config():\n    return default('sft')\n"
    )
    config = make_config(
        checkpoints.saved("as_published")[0],
        prepared,
        train=dict(steps=5, batch_size=8, epsilon=1e-4),  # tests/reference/small.py says why
        data=dict(rows=3, tokens=256),  # examples have 84 to 90 tokens: a row holds two of them or three
    )
    changed = schema.leaves(schema.resolve(schema.default("sft")))
    changed = [(key, leaf[0]) for key, leaf in schema.leaves(config).items() if leaf[0] != changed[key][0]]
    # A process of its own: this one has eight devices.
    subprocess.run(
        [
            *(sys.executable, "-m", "latent_jax.main", f"--config={defaults}", f"--workdir={ours}"),
            *(f"--config.{key}={value}" for key, value in changed),
        ],
        check=True,
        env={**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"},
    )
    finetune.run(config, theirs, like=ours, rows=5)
    return ours, theirs


def test_every_step_takes_the_examples_that_ours_took(both):
    ours, theirs = (lines(directory) for directory in both)
    assert [line["examples"] for line in ours] == [line["examples"] for line in theirs]
    assert sum(line["examples"] for line in ours) > 24, "more than one epoch"
    assert len({line["examples"] for line in ours}) > 1, "packing takes what fits: else following it shows little"


def test_losses_gradients_and_rates_are_ours(both):
    ours, theirs = (lines(directory) for directory in both)
    for mine, stock in zip(ours, theirs, strict=True):
        assert stock["learning_rate"] == pytest.approx(mine["learning_rate"], rel=1e-6)
        tolerance = 1e-5 if mine["step"] == 1 else 1e-3
        for name in ("loss/next_token", "loss/total", "grad_norm"):
            assert stock[name] == pytest.approx(mine[name], rel=tolerance), (mine["step"], name)


def test_the_trained_weights_are_ours(both):
    """Both exports against each other, and against where they began: language model moved alike, vision tower not."""
    start = checkpoints.saved("as_published")[1].state_dict()
    ours, theirs = (
        AutoModelForImageTextToText.from_pretrained(directory / "hf", dtype="float32").state_dict()
        for directory in both
    )
    for name, weight in start.items():
        if "visual" in name:
            assert torch.equal(theirs[name], weight) and torch.equal(ours[name], weight), name
        else:
            moved = (ours[name] - weight).norm()
            assert moved > 0 and (theirs[name] - ours[name]).norm() < 0.02 * moved, name


def test_following_a_run_of_other_conversations(both, prepared, tmp_path):
    config = make_config(checkpoints.saved("as_published")[0], prepared, train=dict(steps=5, batch_size=8))
    for changes, message in (
        (dict(chat=dict(questions=3)), "config.chat.questions: got 3, but the run in"),
        (dict(data=dict(share=0.5)), "config.data.share: got 0.5"),
        (dict(train=dict(steps=6)), "expected a line for each of 6 steps, found 5"),
    ):
        made = {key: {**schema.to_dict(config)[key], **values} for key, values in changes.items()}
        with pytest.raises(UserError, match=re.escape(message)):
            finetune.run(schema.resolve({**schema.to_dict(config), **made}), tmp_path / "run", like=both[0])
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- every family


@pytest.mark.parametrize("family", ["llava", "llava_onevision", "internvl"])
def test_from_prepared_files_to_results(family, prepared, tmp_path):
    """Fine-tuned on scenes' GQA and asked it: everything that a real run does, on random weights."""
    origin = baselines.saved(family)
    assert finetune.run(make_config(origin, prepared), tmp_path / "tuned", rows=3) == 3
    found = lines(tmp_path / "tuned")
    assert [line["examples"] for line in found] == [4, 4, 4]
    assert all(np.isfinite(line["loss/total"]) and line["grad_norm"] > 0 for line in found)

    before = load_file(origin / "model.safetensors")
    after = load_file(tmp_path / "tuned" / "hf" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, weight in before.items():
        frozen = any(part in name for part in ("vision", "projector", "newline"))
        assert torch.equal(weight, after[name]) == frozen, name

    config = schema.default_evaluation()
    config.model.path, config.data.path = str(tmp_path / "tuned" / "hf"), str(prepared)
    config.log.progress, config.evaluate.examples, config.evaluate.max_new_tokens = False, 6, 4
    evaluate.run(schema.resolve(config), tmp_path / "asked", backend.open_backend)
    results = json.loads((tmp_path / "asked" / "results.json").read_text())
    assert results["n"] == 6 and results["backend"]["name"] == f"transformers {family}"
    assert 0 <= results["metrics"]["accuracy"] <= 100
    prompts = [json.loads(line)["prompt"] for line in (tmp_path / "asked" / "predictions.jsonl").open()]
    assert all(prompt.endswith("Answer the question using a single word or phrase.") for prompt in prompts)


def test_a_family_learns_what_it_is_taught(prepared, tmp_path):
    """Two questions again and again: the loss falls to a small part, and the model answers in those words."""
    config = make_config(
        baselines.saved("llava_onevision"),
        prepared,
        data=dict(share=1 / 24),
        train=dict(steps=40, batch_size=2, learning_rate=1e-2, warmup=0.1),
    )
    finetune.run(config, tmp_path / "run")
    losses = [line["loss/total"] for line in lines(tmp_path / "run")]
    assert losses[-1] < 0.1 < 3 < losses[0]
    asked = sft.conversations(train.open_data(config, "train")[0][0][0], 39 * 2, config)
    processor = open_processor(tmp_path / "run" / "hf")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "run" / "hf").eval()
    replies = backend.generate(model, processor, [turns[:1] for turns in asked], 8)
    assert replies == [turns[1]["content"] for turns in asked]


# ---------------------------------------------------------------- resume


def test_a_stopped_run_ends_where_one_left_alone_ends(prepared, tmp_path, monkeypatch):
    config = make_config(
        baselines.saved("internvl"), prepared, train=dict(steps=5), checkpoint=dict(every=2, keep=2), log=dict(every=1)
    )
    finetune.run(config, tmp_path / "whole")

    class Killed(Exception):
        pass

    real = finetune.one_step

    def dies(tuned, steps, processor, config, done, rows):
        if done == 3:
            raise Killed
        return real(tuned, steps, processor, config, done, rows)

    monkeypatch.setattr(finetune, "one_step", dies)
    with pytest.raises(Killed):
        finetune.run(config, tmp_path / "killed")
    assert [path.name for path in (tmp_path / "killed" / "checkpoints").iterdir()] == ["2.pt"]
    monkeypatch.setattr(finetune, "one_step", real)
    finetune.run(config, tmp_path / "killed")
    assert untimed.metrics(tmp_path / "killed") == untimed.metrics(tmp_path / "whole")
    one, other = (load_file(tmp_path / name / "hf" / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert sorted(path.name for path in (tmp_path / "whole" / "checkpoints").iterdir()) == ["4.pt", "5.pt"]


def test_a_signal_saves_and_ends(prepared, tmp_path, monkeypatch):
    config = make_config(baselines.saved("llava"), prepared, train=dict(steps=5))
    real = finetune.one_step

    def told(tuned, steps, processor, config, done, rows):
        if done == 1:
            signal.raise_signal(signal.SIGTERM)
        return real(tuned, steps, processor, config, done, rows)

    monkeypatch.setattr(finetune, "one_step", told)
    assert finetune.run(config, tmp_path) == 2
    assert (tmp_path / "checkpoints" / "2.pt").exists() and not (tmp_path / "hf").exists()


# ---------------------------------------------------------------- data


def test_rows_at_a_time_change_memory_and_not_numbers(prepared, tmp_path):
    config = make_config(baselines.saved("llava_onevision"), prepared, train=dict(epsilon=1e-4))
    finetune.run(config, tmp_path / "one", rows=1)
    finetune.run(config, tmp_path / "all", rows=64)
    for one, every in zip(untimed.metrics(tmp_path / "one"), untimed.metrics(tmp_path / "all"), strict=True):
        assert one == pytest.approx(every, rel=1e-4)


def test_broken_records_are_skipped_counted_and_at_last_an_error(monkeypatch):
    records = [small.record(i) for i in range(200)]
    for i in range(0, 200, 20):
        records[i] = {**records[i], "images": [b"no image"]}
    processor = open_processor(baselines.saved("llava"))
    pace = baseline_steps.Pace(8)
    config = make_config("x", data=dict(max_bad=0.2))
    steps = baseline_steps.Steps(records, processor, config, pace)
    taken = [next(steps) for _ in range(20)]
    assert all(examples == 8 for _, examples in taken) and 0 < steps.skipped < 20
    assert steps.state["seen"] == 20 * 8 + steps.skipped
    steps = baseline_steps.Steps(records, processor, make_config("x", data=dict(max_bad=0.01)), pace)
    with pytest.raises(UserError, match="records are broken, more than 1%: record 'r.*not an image"):
        for _ in range(20):
            next(steps)


def test_a_followed_run_that_skipped_what_this_one_can_read():
    pace = baseline_steps.Pace(4, (4, 3), (0, 2))
    pace.check(1, 1)
    pace.check(2, 0)
    with pytest.raises(UserError, match="step 3: 0 records were skipped before it, 2 in the run that is followed"):
        pace.check(3, 0)
    assert (pace.examples(1), pace.examples(2), baseline_steps.Pace(4).examples(9)) == (4, 3, 4)


# ---------------------------------------------------------------- bad input


def test_bad_input(prepared, tmp_path, capsys):
    llava = baselines.saved("llava")
    run = lambda config: finetune.run(config, tmp_path / "run")
    with pytest.raises(UserError, match="baselines are fine-tuned by 'sft'"):
        run(schema.resolve(schema.default("pretrain")))
    with pytest.raises(UserError, match="config.data.max_pixels: got 9999, expected 0: images of llava have"):
        run(make_config(llava, prepared, data=dict(max_pixels=9999)))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match="model_type is 'gpt2', expected one of internvl, llava, llava_onevision, qwen"):
        run(make_config(tmp_path, prepared))
    assert not (tmp_path / "run").exists()
    broken = tmp_path / "broken"
    shutil.copytree(llava, broken)
    for file, message in (
        ("model.safetensors", "broken: AutoModelForImageTextToText cannot open it: "),
        ("preprocessor_config.json", "broken: AutoImageProcessor cannot open it: "),
        ("tokenizer.json", "broken: AutoTokenizer cannot open it: "),
        ("config.json", "config.json"),
    ):
        (broken / file).unlink()
        with pytest.raises(UserError, match=message):
            run(make_config(broken, prepared))
    assert not (tmp_path / "run").exists()
    finetune.begin(make_config(llava), tmp_path / "begun", open_processor(llava), None)
    with pytest.raises(UserError, match="was begun as .*'family': 'llava'.*now it is .*'like': 'elsewhere'"):
        finetune.begin(make_config(llava), tmp_path / "begun", open_processor(llava), "elsewhere")
    mesh = sharding.make_mesh(1, -1, 1)
    with pytest.raises(UserError, match="begun by another program .baseline.; use a new --workdir"):
        shapes.settle(
            *(make_config(llava), tmp_path / "begun", sft.METHOD, small.processor(), small.model_config()),
            *([], mesh, small.directory()),
        )
    with pytest.raises(SystemExit) as end:
        finetune.main(["--config=configs/finetune.py", "--rows=0"])
    assert end.value.code == 2 and "--rows: got '0', expected an integer >= 1" in capsys.readouterr().err


def test_the_command(prepared, tmp_path):
    settings = {
        "model.path": baselines.saved("llava"),
        "data.name": "gqa",
        "data.path": prepared,
        "train.steps": 1,
        "train.batch_size": 2,
        "log.tensorboard": "false",
        "checkpoint.export": "false",
    }
    arguments = ["--config=configs/finetune.py", f"--workdir={tmp_path}", "--rows=2"]
    finetune.main([*arguments, *(f"--config.{key}={value}" for key, value in settings.items())])
    assert [line["step"] for line in lines(tmp_path)] == [1]
    assert json.loads((tmp_path / "config.json").read_text())["measured"]["baseline"]["family"] == "llava"
