"""The whole life of a method that writes latents inside its answers and has nothing else: no head, no thought before.

Its final hidden states are fed back as they are (Mirage's inference), so its export is the model and a JSON file.
"""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

import latent_jax
from latent_jax import compare, convert, evaluate, train
from latent_jax.config import schema
from latent_jax.config.fields import option
from latent_jax.data.builders.build import build_scenes
from latent_jax.data.chat import Processor
from latent_jax.data.prompt_batch import one_per_row
from latent_jax.errors import UserError
from latent_jax.inference import decode
from latent_jax.methods import sft
from latent_jax.methods.contract import Method, Span
from latent_jax.models.hf_io import LATENT_CONFIG, LATENT_WEIGHTS
from tests.reference import benchmark_records, small
from tests.reference.ours import on_device

NAME = "tests.methods.test_span_alone"


@dataclasses.dataclass(frozen=True)
class Fed:
    count: int = option(3, "latents of a span, or rows of their grid", low=1)
    columns: int = option(0, "columns of their grid; 0: none", low=0)


@dataclasses.dataclass(frozen=True)
class FedConfig(sft.SftConfig):
    fed: Fed = Fed()


def layout(record, index, config, processor: Processor):
    return processor.render_conversations(sft.conversations(record, index, config), key=record["key"])


def size(example, config):
    return (config.fed.count, config.fed.columns) if config.fed.columns else config.fed.count


METHOD = Method(
    config=FedConfig,
    layout=layout,
    coefficients=sft.coefficients,
    weights=sft.weights,
    loss=sft.loss,
    span=Span(
        most=lambda config: config.fed.count * max(1, config.fed.columns),
        shape=size,
        feed=lambda model, hidden, carry, i, config: (hidden, hidden, carry),
        rule=lambda tokens, count, config: jnp.full(len(tokens), count == 0),
    ),
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    directory = tmp_path_factory.mktemp("alone")
    build_scenes(directory / "prepared", sizes={"train": 40, "validation": 8})
    config = small.config(
        NAME,
        chat=dict(questions=2),
        data=dict(name="scenes_questions", path=str(directory / "prepared"), image_patches=0, sample=16),
        mesh=dict(replica=2, fsdp=4),
        train=dict(steps=1, schedule="constant", batch_size=8, warmup=0.0),
        checkpoint=dict(every=1),
    )
    train.run(config, directory / "run")
    return directory / "run"


def question(text="What color is it?"):
    image = {"type": "image", "image": small.record(0)["images"][0]}
    return [{"role": "user", "content": [image, {"type": "text", "text": text}]}]


def test_its_export_is_the_model_and_its_settings(made, tmp_path):
    convert.main([f"--checkpoint={made}", f"--output={tmp_path / 'hf'}"])
    convert.main([f"--checkpoint={tmp_path / 'hf'}", f"--output={tmp_path / 'again'}"])
    for directory in (made / "hf", tmp_path / "hf", tmp_path / "again"):
        assert json.loads((directory / LATENT_CONFIG).read_text())["fed"] == {"count": 3, "columns": 0}
        assert not (directory / LATENT_WEIGHTS).exists()
    loaded = [latent_jax.load(path) for path in (made, made / "hf", tmp_path / "again")]
    found = [vlm.reply([question()], 8, keep=True)[0] for vlm in loaded]
    assert found[0].ids == found[1].ids == found[2].ids
    assert [(reply.opened, reply.closed, reply.spans[0].inputs.shape) for reply in found] == [(1, 1, (3, 64))] * 3
    assert all(vlm.writes and not vlm.thinks for vlm in loaded)
    with pytest.raises(UserError, match="has no latent head"):
        loaded[1].imagine("a red ball")


def evaluation(model, monkeypatch, **settings):
    records = benchmark_records.gqa(images=2, each=2)
    monkeypatch.setattr(evaluate.sources, "split_names", lambda name, path: ["testdev"])
    monkeypatch.setattr(evaluate.sources, "open_source", lambda name, path, split: records)
    monkeypatch.setattr(evaluate.sources, "fingerprint", lambda name, path, split: "records")
    config = schema.default_evaluation()
    config.data.path, config.log.progress, config.model.path = "there", False, str(model)
    config.evaluate.update(max_new_tokens=3, **settings)
    return schema.resolve(config)


def test_an_evaluation_lets_it_write_unless_told_otherwise(made, tmp_path, monkeypatch):
    """From the export as from the workdir; and no prompt asks for latents before the answer."""
    for name, model, settings, opened in (
        ("unset", made / "hf", {}, 4),
        ("workdir", made, {}, 4),
        ("no", made / "hf", dict(imagine=False), 0),
    ):
        found = evaluate.run(evaluation(model, monkeypatch, **settings), tmp_path / name)
        assert found["imagine"] is (name != "no") and found["skipped"]["count"] == 0
        assert found["spans"]["opened"] == opened, name
    compare.main([f"--a={tmp_path / 'unset'}", f"--b={tmp_path / 'no'}"])


def test_its_latents_are_replaced_and_that_resumes(made, tmp_path, monkeypatch):
    records = benchmark_records.gqa(images=2, each=2)
    names = [question["id"] for record in records for question in record["questions"]]
    (tmp_path / "donors.json").write_text(json.dumps(dict(zip(names, names[::-1], strict=True))))
    config = evaluation(made / "hf", monkeypatch, interventions=True, donors=str(tmp_path / "donors.json"))
    evaluate.run(config, tmp_path / "own")
    found = json.loads((tmp_path / "own" / "interventions.json").read_text())
    names = ["zero", "mean", "noise", "shuffled", "permuted", "none", "donor"]
    assert sorted(found["interventions"]) == sorted(names) and found["latents"]["count"] == 4
    results = {name: json.loads((tmp_path / "own" / f"latents_{name}" / "results.json").read_text()) for name in names}
    assert {name: each["spans"]["opened"] for name, each in results.items()} == {**dict.fromkeys(names, 4), "none": 0}
    assert all(each["skipped"]["count"] == 0 for each in results.values())
    # Killed behind two replies of one of them.
    torn = tmp_path / "own" / "latents_noise"
    whole = (torn / "predictions.jsonl").read_text()
    (torn / "predictions.jsonl").write_text("".join(whole.splitlines(True)[:2]) + '{"id": "x')
    shutil.copy(tmp_path / "own" / "interventions.json", tmp_path / "before.json")
    for file in (torn / "results.json", tmp_path / "own" / "interventions.json"):
        file.unlink()
    evaluate.run(config, tmp_path / "own")
    assert (torn / "predictions.jsonl").read_text() == whole
    assert (tmp_path / "own" / "interventions.json").read_text() == (tmp_path / "before.json").read_text()


@pytest.mark.parametrize("spans", ["[2, 1, 1]", "[1, 2]", '"x"', "null", "[true, true]", "[-1, 1]", "[1.0, 1]"])
def test_counts_of_spans_that_are_none_are_told(made, tmp_path, monkeypatch, spans):
    config = evaluation(made / "hf", monkeypatch)
    evaluate.run(config, tmp_path / "run")
    file = tmp_path / "run" / "predictions.jsonl"
    lines = file.read_text().splitlines(True)
    assert '"spans": [1, 1]' in lines[0]
    file.write_text(lines[0].replace('"spans": [1, 1]', f'"spans": {spans}') + "".join(lines[1:]))
    with pytest.raises(UserError, match=rf"^{file}:1: .*(spans|damaged)"):
        evaluate.run(config, tmp_path / "run")


@pytest.mark.parametrize("shape", [(3, 0), (2, 3)])
def test_a_given_answer_is_read_as_it_was_written(made, shape):
    """Behind its own latents the likeliest word is the one that it said there; behind others the words are less so."""
    vlm = loaded(made)
    vlm = dataclasses.replace(vlm, settings=dataclasses.replace(vlm.settings, fed=Fed(*shape)))
    (reply,) = vlm.reply([question()], 12, keep=True)
    end = reply.ids.index(vlm.config.vision_end_token_id)
    said = {"type": "text", "text": "red and blue"}
    fed = reply.spans[0].inputs
    own, zero = ([{"type": "latents", "latents": latents}, said] for latents in (fed, 0 * fed))
    examples, given = vlm.prompts([question()], answers=[own])
    rows, model = one_per_row(examples, vlm.config), vlm.model.vlm
    batch = on_device(rows.batch)
    hidden, _ = model.decode(decode.embed(model, batch, jnp.asarray(given), rows.image_patches), batch)
    closed = int(np.flatnonzero(examples[0].tokens == vlm.config.vision_end_token_id)[-1])
    assert int(model.logits(hidden[0, 0, closed]).argmax()) == reply.ids[end + 1]
    likely, other = (vlm.score([question()], [answer])[0] for answer in (own, zero))
    assert likely.shape == other.shape and np.abs(likely - other).max() > 1e-3


def test_latents_may_be_whole_numbers(made):
    text = {"type": "text", "text": "red"}
    found = [
        loaded(made).score([question()], [[{"type": "latents", "latents": np.ones((3, 64), kind)}, text]])[0]
        for kind in (int, np.float32)
    ]
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize(
    "part, message",
    [
        ({"type": "latents"}, "answer 0: .*expected an array of|answer 0: .*finite"),
        ({"type": "latents", "latents": [[1.0], [1.0, 2.0]]}, "answer 0"),
        ({"type": "latents", "latents": "many"}, "answer 0"),
        ({"type": "latents", "latents": np.zeros((2, 64))}, r"shape \(2, 64\), expected \(3, 64\)"),
        ({"type": "latents", "latents": np.full((3, 64), np.inf)}, "finite"),
        ({"type": "imagine"}, "expected text or latents"),
        ({"type": "text"}, "text"),
    ],
)
def test_an_answer_that_cannot_be_scored_is_told(made, part, message):
    with pytest.raises(UserError, match=message):
        loaded(made).score([question()], [[{"type": "text", "text": "red"}, part]])


def loaded(made):
    return latent_jax.load(made / "hf")


@pytest.mark.parametrize(
    "spans, message",
    [
        ([[np.zeros((2, 64))]], r"shape \(2, 64\)"),
        ([[np.zeros((3, 64))] * 9], "span 4 of a conversation"),
        ([[np.full((3, 64), "a")]], "span 0"),
        ([[np.full((3, 64), None)]], "span 0"),
        ([(), ()], "spans: got those of 2"),
    ],
)
def test_spans_that_cannot_be_fed_are_told(made, spans, message):
    with pytest.raises(UserError, match=message):
        loaded(made).reply([question()], 6, spans=spans)
