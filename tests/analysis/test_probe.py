"""The report on imagination: its probe answers as the facade decodes, for every arm, with and without latents."""

import dataclasses
import shlex

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from latent_jax.analysis import geometry, probe
from latent_jax.data import batch_shapes, packing
from latent_jax.errors import UserError
from latent_jax.inference.vlm import VLM
from latent_jax.methods import pretrain
from latent_jax.methods.latents import as_inputs
from latent_jax.models.parameters import Structure
from latent_jax.training.state import new_model
from tests.reference import small

COUNT = 6


@pytest.fixture(scope="module")
def facade():
    """Random weights that still answer with one color and then end, which of the colors by what they have seen."""
    config, processor = small.config(), small.processor()
    structure = Structure.of(nnx.eval_shape(lambda: new_model(config, pretrain.METHOD, small.model_config())))
    arrays = jax.jit(lambda: structure.arrays(new_model(config, pretrain.METHOD, small.model_config())))()
    arrays = {path: np.array(array) for path, array in arrays.items()}
    rng = np.random.default_rng(0)
    ids = processor.tokenizer.convert_tokens_to_ids
    colors = [processor.tokenizer(color)["input_ids"] for color in small.COLORS]
    assert all(len(color) == 1 for color in colors)
    (newline,) = processor.tokenizer("\n")["input_ids"]
    colors, end = [color[0] for color in colors], ids("<|im_end|>")
    embed, lm_head = arrays["vlm.text.embed"], arrays["vlm.text.lm_head"]
    embed *= 8
    lm_head *= 0.01
    lm_head[end] = embed[colors].sum(0)
    for color in colors:
        lm_head[color] = embed[newline] + rng.normal(size=embed.shape[1])
    for path in ("head.slots", "head.fc1", "head.fc2"):
        arrays[path] = arrays[path] * 4
    model = structure.build({path: jnp.asarray(array) for path, array in arrays.items()})
    return VLM(model, processor, config, (end,), "small")


def said(facade, content, question) -> str:
    (answer,) = facade.generate([[{"role": "user", "content": [*content, {"type": "text", "text": question}]}]], 4)
    return answer


def imagined(record):
    return [{"type": "imagine", "text": record["captions"][0]}]


@pytest.fixture(scope="module")
def records(facade):
    """With every second first question, the answer is what the model says of the image that it imagines."""
    made = [small.record(index) for index in range(COUNT)]
    for record in made[::2]:
        first = record["questions"][0]
        first["answer"] = said(facade, imagined(record), first["question"])
        assert first["answer"] in small.COLORS
    return [*made, small.record(COUNT) | {"questions": []}]


def right(facade, records, content_of, text_of) -> list[bool]:
    """By greedy decoding, question by question: is the decoded answer the true one, and does it end there?"""
    return [
        said(facade, content_of(record), text_of(record, question["question"])) == question["answer"]
        for record in records
        for question in record["questions"]
    ]


def over_imagined(facade, records):
    return right(facade, records, imagined, lambda record, question: question)


def over_text(facade, records):
    return right(facade, records, lambda _: [], lambda record, question: f"{record['captions'][0]} {question}")


def test_answers_are_those_of_greedy_decoding(facade, records):
    asked = records[:COUNT]
    latents, texts = probe.probe_layouts(asked, facade.settings.latent, facade.processor)
    z = jnp.stack([facade.imagine(record["captions"][0]) for record in asked])
    given = as_inputs(facade.model.vlm, z, facade.settings.latent)
    found = probe.answers(facade.model, [facade.processor.lay_out(layout) for layout in latents], given)
    expected = over_imagined(facade, asked)
    assert found.tolist() == expected and 3 <= sum(expected) < len(expected)
    found = probe.answers(facade.model, [facade.processor.lay_out(layout) for layout in texts], None)
    assert found.tolist() == over_text(facade, asked)


def test_chunks_change_no_answer(facade, records, monkeypatch):
    texts = probe.probe_layouts(records[:COUNT], facade.settings.latent, facade.processor)[0]
    examples = [facade.processor.lay_out(layout) for layout in texts]
    given = jnp.asarray(np.random.default_rng(1).normal(size=(COUNT, 4, 64)), jnp.float32)
    whole = probe.answers(facade.model, examples, given)
    monkeypatch.setattr(probe, "CHUNK", 4)  # six examples: a full chunk and a padded one
    assert probe.answers(facade.model, examples, given).tolist() == whole.tolist()


def test_records_that_cannot_be_laid_out_are_left_out_of_the_report(facade, records):
    odd = [{**records[0], "captions": []}, {**records[1], "images": [b"no image"]}]
    kept, examples = probe.usable([odd[0], *records, odd[1]], small.config(), facade.processor)
    assert kept == records and len(examples) == len(records)
    with pytest.raises(UserError, match="record '.*': IndexError"):
        probe.usable(odd[:1], small.config(), facade.processor)


def test_report_has_every_arm_and_the_geometry(facade, records):
    config = small.config()
    examples = [facade.processor.lay_out(probe.caption_layout(record, config)) for record in records]
    batch_shape = batch_shapes.choose(examples, batch_size=4, window_patches=16)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, image_patches=batch_shape.image_patches))
    batches, ticks, seen = list(packing.batches(examples, batch_shape)), [0], []

    def tick(count):
        ticks.append(ticks[-1] + count)

    found = probe.report(
        facade.model, batches, records, config, facade.processor, tick, lambda *both: seen.extend(both)
    )
    assert [len(x) for x in seen] == [len(records)] * 2
    assert found["cosine/matched"] == pytest.approx(geometry.matched_cosine(*seen))
    assert {f"probe/{arm}" for arm in probe.ARMS} <= found.keys()
    assert found["probe/questions"] == 2 * COUNT
    assert found["probe/imagined"] == pytest.approx(100 * np.mean(over_imagined(facade, records)))
    assert found["probe/caption as text"] == pytest.approx(100 * np.mean(over_text(facade, records)))
    assert all(np.isfinite(value) for value in found.values())
    assert ticks[-1] == probe._work(records) == 2 * (COUNT + 1) + 5 * COUNT
    table = "\n".join(probe.table({"examples": len(records), "split": "validation", **found}))
    assert all(arm in table for arm in probe.ARMS) and "held-out validation: 7 captions" in table


def test_a_legend_explains_each_word_and_photos_have_no_empty_cells(facade, records):
    numbers = dict.fromkeys(
        ("cosine/informative", "cosine/empty", "cosine/shuffled", "effective_rank/predicted", "effective_rank/target")
        + ("norm_ratio", *(f"retrieval/{kind}@{k}" for kind in ("recall", "chance") for k in (1, 5))),
        0.5,
    )
    found = {"examples": 7, "split": "validation", "data": "coco_captions", **numbers}
    said = "\n".join(probe.table(found) + probe.legend(found))
    assert "empty" not in said and "probe" not in said and "cells far from the mean latent 0.500" in said
    probed = found | {"data": "scenes", "probe/questions": 3.0} | {f"probe/{arm}": 1.0 for arm in probe.ARMS}
    said = "\n".join(probe.legend(probed))
    words = ("informative cells", "empty cells", "effective rank", "norm ratio", "recall@k", *probe.ARMS[1:])
    assert all(word in said.lower() for word in words if word != "caption as text") and "caption as text" in said
    assert max(len(line) for line in said.splitlines()) <= 120


def test_advice_is_commands_that_a_shell_takes(records, tmp_path):
    config = small.config()
    record = records[0] | {"captions": ['a dog\'s "red" $HOME `ball`;\nrm x']}
    generate, finetune = (line.strip() for line in probe.advice(record, config, tmp_path)[1:])
    words = shlex.split(generate, comments=True)
    assert words[:4] == ["python", "-m", "latent_jax.generate", f"--model={tmp_path}"]
    assert words[4:] == [
        '--imagine=a dog\'s "red" $HOME `ball`; rm x',
        f"--prompt={record['questions'][0]['question']}",
    ]
    assert f"--config.model.path={tmp_path}/hf" in shlex.split(finetune)
    plain = probe.advice(record | {"questions": []}, config, tmp_path)
    assert len(plain) == 2 and "#" not in plain[1]
