"""Interventions on latents: every one evaluated, compared with the model's own, and what is told of the latents."""

import json

import numpy as np
import pytest

from latent_jax import config as schema
from latent_jax import evaluate
from latent_jax.analysis import interventions
from latent_jax.benchmarks.settings import LATENTS
from latent_jax.errors import UserError
from latent_jax.evaluate import Backend
from tests import test_imagined as imagined
from tests.reference import benchmark_records as records

GEOMETRY = {"count": 4, "pairwise_cosine": 0.5, "pairwise_cosine_centred": 0.1, "norm_ratio": 1.0}


def config(**changes):
    made = schema.default_evaluation()
    made.data.path, made.log.progress = "there", False
    made.evaluate.update({"imagine": True, **changes})
    return schema.resolve(made)


@pytest.fixture(autouse=True)
def data(monkeypatch):
    made = records.gqa(images=3, each=3)  # nine questions: a batch of eight and one alone
    monkeypatch.setattr(evaluate.sources, "split_names", lambda name, path: ["testdev"])
    monkeypatch.setattr(evaluate.sources, "open_source", lambda name, path, split: made)
    monkeypatch.setattr(evaluate.sources, "fingerprint", lambda name, path, split: "records")
    return {q["question"]: q["answer"] for record in made for q in record["questions"]}


def test_every_intervention_is_compared_with_the_models_own(data, tmp_path, capsys):
    """A model that is right about four of five questions with its own latents, and about none with others."""
    asked = []

    def backend(config):
        def answer(conversations, tokens):
            content = [turns[0]["content"] for turns in conversations]
            assert all((parts[-1] == {"type": "imagine"}) for parts in content)
            asked.append((config.evaluate.latents, len(conversations)))
            prompts = [parts[-2]["text"].partition("\n")[0] for parts in content]
            right = [data[prompt] if config.evaluate.latents in ("own", "noise") else "nothing" for prompt in prompts]
            return [answer if answer != "red" else "pink" for answer in right]

        return Backend(answer, {"name": "fake", "min_pixels": 1, "max_pixels": 2}, lambda conversations: GEOMETRY)

    evaluate.run(config(interventions=True, batch_size=8), tmp_path, backend)
    found = json.loads((tmp_path / "interventions.json").read_text())
    wrong = sum(answer == "red" for answer in data.values())
    own = 100 * (9 - wrong) / 9
    assert found["own"] == pytest.approx(own) and found["latents"] == GEOMETRY
    assert list(found["interventions"]) == list(LATENTS[1:])
    for name, result in found["interventions"].items():
        assert result["difference"] == pytest.approx(0 if name == "noise" else -own), name
    # Alone, nothing could be shuffled: the ninth question had another beside it.
    assert [size for mode, size in asked if mode == "shuffled"] == [8, 2]
    assert [size for mode, size in asked if mode == "own"] == [8, 1]
    assert json.loads((tmp_path / "latents_zero" / "results.json").read_text())["latents"] == "zero"
    said = capsys.readouterr().out
    assert f"own: {own:.2f} %" in said and all(f"  {name} " in said for name in LATENTS[1:])


def test_geometry_is_that_of_the_predicted_latents():
    vlm, conversations = imagined.facade(), [imagined.user(f"thing {i}", imagined.SILENT) for i in range(5)]
    found = interventions.geometry(vlm, conversations)
    latents = np.stack([vlm.prompts([each]).latents[0] for each in conversations]).astype(np.float64)
    flat = latents.reshape(5, -1)
    unit = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    cosines = [unit[i] @ unit[j] for i in range(5) for j in range(5) if i != j]
    assert found["pairwise_cosine"] == pytest.approx(np.mean(cosines), abs=1e-5)
    mean, scale = (np.asarray(x[...], np.float64) for x in (vlm.model.head.mean, vlm.model.head.scale))
    true = np.sqrt((mean**2).sum() + (scale**2).sum())
    assert found["norm_ratio"] == pytest.approx(np.sqrt((latents**2).sum(-1).mean()) / true, rel=1e-5)
    assert found["count"] == 5 and found["pairwise_cosine_centred"] < 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(imagine=False, interventions=True), "config.evaluate.interventions: got true; it takes"),
        (dict(latents="zero", interventions=True), "config.evaluate.latents: got 'zero'; it takes"),
        (dict(imagine=False, latents="zero"), "config.evaluate.latents: got 'zero'; it takes"),
        (dict(latents="ones"), "config.evaluate.latents: got 'ones', expected one of"),
    ],
)
def test_settings_that_do_not_go_together(changes, message):
    with pytest.raises(UserError, match=message):
        config(**changes)
