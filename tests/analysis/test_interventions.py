"""Interventions on latents: every one evaluated, compared with the model's own, and what is told of the latents."""

import dataclasses
import json

import numpy as np
import pytest

from latent_jax import evaluate
from latent_jax.analysis import interventions
from latent_jax.config import schema
from latent_jax.config.evaluation import LATENTS
from latent_jax.errors import UserError
from latent_jax.evaluate import Backend
from latent_jax.inference.prompts import Thought
from tests.reference import benchmark_records as records
from tests.reference import imagining
from tests.reference.stub_facade import Facade, question, thought


def backend(vlm):
    return lambda config: Backend(lambda c, tokens: vlm.generate(c, tokens), dict(min_pixels=1, max_pixels=2), vlm)


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
    """A model that is right where its own latents stand, in whatever order, and nowhere else."""
    same = lambda text, given: len(given) and np.array_equal(np.sort(given[0], 0), np.sort(thought(text), 0))
    evaluate.run(config(interventions=True, batch_size=8), tmp_path, backend(Facade(data, same)))
    found = json.loads((tmp_path / "interventions.json").read_text())
    assert found["own"] == 100 and found["latents"]["count"] == 9
    assert list(found["interventions"]) == [name for name in LATENTS[1:] if name != "donor"]
    for name, result in found["interventions"].items():
        assert result["difference"] == (0 if name == "permuted" else -100), name
    assert json.loads((tmp_path / "latents_zero" / "results.json").read_text())["latents"] == "zero"
    said = capsys.readouterr().out
    assert "own: 100.00 %" in said and all(f"  {name} " in said for name in found["interventions"])


@pytest.mark.parametrize("name", [name for name in LATENTS if name not in ("own", "donor", "none")])
def test_what_stands_there_is_of_the_split_and_the_question_never_of_the_batch(data, tmp_path, name):
    seen = []
    for size, examples in ((1, 0), (4, 0), (9, 5)):
        vlm = Facade(data, lambda text, given: True)
        evaluate.run(config(latents=name, batch_size=size, examples=examples), tmp_path / f"{size}", backend(vlm))
        seen.append({text: given[0] for text, given in vlm.asked})
    assert len(seen[0]) == len(seen[1]) == 9 and len(seen[2]) == 5
    for other in seen[1:]:
        for text, given in other.items():
            np.testing.assert_array_equal(given, seen[0][text])


def test_each_replacement_is_what_it_says(data, tmp_path):
    own = {text: thought(text) for text in data}
    sample = np.stack(list(own.values()))
    found = {}
    for name in LATENTS[1:]:
        vlm, told = Facade(data, lambda text, given: True), {"latents": name}
        if name == "donor":
            ids = [q["id"] for record in evaluate.sources.open_source("", "", "") for q in record["questions"]]
            (tmp_path / "donors.json").write_text(json.dumps(dict(zip(ids, [ids[2]] * len(ids), strict=True))))
            told["donors"] = str(tmp_path / "donors.json")
        evaluate.run(config(**told), tmp_path / name, backend(vlm))
        found[name] = {text: given[0] if len(given) else None for text, given in vlm.asked}
    texts = list(data)
    for place, text in enumerate(texts):
        assert found["none"][text] is None and not found["zero"][text].any()
        np.testing.assert_allclose(found["mean"][text], sample.mean(0), atol=1e-6)
        np.testing.assert_array_equal(found["shuffled"][text], own[texts[(place + 4) % 9]])
        np.testing.assert_array_equal(found["donor"][text], own[texts[2]])
        assert sorted(map(tuple, found["permuted"][text])) == sorted(map(tuple, own[text]))
        assert not np.array_equal(found["permuted"][text], own[text])
    noise = (np.stack(list(found["noise"].values())) - sample.mean(0)) / sample.std(0)
    assert abs(noise.mean()) < 0.3 and abs(noise.std() - 1) < 0.2 and len(np.unique(noise)) == noise.size


@pytest.mark.parametrize("name", ["mean", "noise", "shuffled"])
def test_a_question_that_cannot_be_shown_is_no_other_ones_trouble(data, tmp_path, name):
    """The third of nine has a broken image: it is skipped and counted, and lends nobody its latents."""
    texts = list(data)
    vlm = Facade(data, lambda text, given: True)
    think = vlm.think

    def broken(conversations):
        if any(question(turns) == texts[2] for turns in conversations):
            raise UserError("an image cannot be read")
        return think(conversations)

    vlm.think = broken
    told = config(latents=name, batch_size=4)
    told = dataclasses.replace(told, data=dataclasses.replace(told.data, max_bad=0.5))
    found = evaluate.run(told, tmp_path, backend(vlm))
    given = {text: array[0] for text, array in vlm.asked}
    assert found["skipped_as_wrong"] == (name != "shuffled") and len(given) == 9 - (name != "shuffled")
    whole = [thought(text) for text in texts if text != texts[2]]
    if name == "mean":
        np.testing.assert_allclose(given[texts[0]], np.mean(whole, 0), atol=1e-6)
    if name == "shuffled":
        np.testing.assert_array_equal(given[texts[7]], thought(texts[3]))  # its donor was the third


@pytest.mark.parametrize("content", ["{}", "[]", '{"0": 1}', "no JSON"])
def test_a_donor_that_is_no_question_is_named(data, tmp_path, content):
    (tmp_path / "donors.json").write_text(content)
    with pytest.raises(UserError, match=r"donors\.json: "):
        told = config(latents="donor", donors=str(tmp_path / "donors.json"))
        evaluate.run(told, tmp_path / "run", backend(Facade(data, lambda text, given: True)))


def test_geometry_is_that_of_the_predicted_latents():
    vlm, conversations = imagining.facade(), [imagining.user(f"thing {i}", imagining.SILENT) for i in range(5)]
    found = interventions.geometry(vlm, conversations, 4)
    latents = np.stack([vlm.think([each])[0][0].latents for each in conversations]).astype(np.float64)
    for name, flat in (("", latents.reshape(5, -1)), ("_centred", (latents - latents.mean(0)).reshape(5, -1))):
        unit = flat / np.linalg.norm(flat, axis=1, keepdims=True)
        cosines = [unit[i] @ unit[j] for i in range(5) for j in range(5) if i != j]
        assert found[f"pairwise_cosine{name}"] == pytest.approx(np.mean(cosines), abs=1e-4)
    mean, scale = (np.asarray(x[...], np.float64) for x in (vlm.model.head.mean, vlm.model.head.scale))
    true, norm = np.sqrt((mean**2).sum() + (scale**2).sum()), np.sqrt((latents**2).sum(-1).mean())
    assert found["norm"] == pytest.approx(norm, rel=1e-5) and found["norm_ratio"] == pytest.approx(
        norm / true, rel=1e-5
    )
    assert found["count"] == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(imagine=False, interventions=True), "config.evaluate.interventions: got true; it takes"),
        (dict(latents="zero", interventions=True), "config.evaluate.latents: got 'zero'; it takes"),
        (dict(imagine=False, latents="zero"), "config.evaluate.latents: got 'zero'; it takes"),
        (dict(latents="ones"), "config.evaluate.latents: got 'ones', expected one of"),
        (dict(latents="donor"), "config.evaluate.donors: got '' with config.evaluate.latents=donor"),
        (dict(donors="a.json"), "config.evaluate.donors: got 'a.json' with config.evaluate.latents=own"),
    ],
)
def test_settings_that_do_not_go_together(changes, message):
    with pytest.raises(UserError, match=message):
        config(**changes)


@pytest.mark.parametrize("name", ["mean", "noise"])
def test_latents_of_a_size_that_the_sample_has_not_take_the_mean_at_the_same_share(name):
    """A span that its reply's end cut short, where all of the sample's were whole."""
    rng = np.random.default_rng(0)
    sample = [Thought(each, each) for each in rng.normal(size=(5, 4, 3)).astype(np.float32)]
    known = interventions.moments(sample)
    assert known.mean.shape == (4, 3)
    still = known._replace(deviation=np.zeros_like(known.mean))  # noise of no size is the mean
    for size, places in ((2, [0, 2]), (1, [0]), (4, [0, 1, 2, 3]), (8, [0, 0, 1, 1, 2, 2, 3, 3])):
        found = interventions.replaced(name, np.ones((size, 3), np.float32), still, 0)
        np.testing.assert_allclose(found, known.mean[places])
    assert interventions.replaced(name, np.ones((2, 3), np.float32), known, 0).shape == (2, 3)


@pytest.mark.parametrize("name", ["mean", "noise"])
def test_a_mean_of_no_latents_is_told(name):
    """The first reply with latents is none of the sample."""
    with pytest.raises(UserError, match=rf"config\.evaluate\.latents={name}: no reply to a sample"):
        interventions.replaced(name, np.ones((2, 3), np.float32), interventions.moments([]), 0)
