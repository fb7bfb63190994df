"""How each family's conversations become model inputs: what is written for an image, where the loss falls."""

import functools

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, LlavaOnevisionProcessor

from latent_jax.config import schema
from latent_jax.errors import UserError
from tests.reference import baselines, checkpoints
from tests.reference.conversations import picture, user
from third_party import backend
from third_party.families import open_processor
from third_party.model import Tuned
from third_party.processor import IGNORED

FAMILIES = ["llava", "llava_onevision", "internvl", "qwen2_5_vl"]
SIZES = [(40, 40), (30, 90), (200, 50), (100, 101), (84, 84), (28, 60), (28, 300), (333, 40)]


def directory(family: str):
    return checkpoints.saved("as_published")[0] if family == "qwen2_5_vl" else baselines.saved(family)


@functools.cache
def loaded(family: str):
    model = AutoModelForImageTextToText.from_pretrained(directory(family), dtype="float32").eval()
    return open_processor(directory(family)), model


def conversations() -> list[list[dict]]:
    """One image of every shape, several images, none."""
    several = user(picture(40, 80, 8), picture(90, 30, 9), "Which one?")
    return [
        *(user(picture(*size, seed), "What is it?") for seed, size in enumerate(SIZES)),
        several,
        user("No picture."),
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_placeholder_meets_its_feature(family):
    """The model itself counts, and refuses one placeholder too few; it replies alike in a batch and alone."""
    processor, model = loaded(family)
    turns = conversations()
    together = backend.generate(model, processor, turns, 4)
    assert together == [backend.generate(model, processor, [each], 4)[0] for each in turns]
    assert len(set(together)) > 1
    inputs, _ = processor.batch(processor.ask(turns[:1]), "left")
    image = model.config.image_token_id
    assert (inputs["input_ids"] == image).any()
    first = int((inputs["input_ids"][0] == image).nonzero()[0])
    inputs["input_ids"][0, first] = inputs["input_ids"][0, 0]
    with pytest.raises((ValueError, RuntimeError), match="do not match"):
        model(**inputs)


def test_features_of_a_onevision_image_are_counted_as_its_processor_counts():
    """At published sizes: tiles of 384 pixels with 27 x 27 features, up to 36 of them, the features of nine kept."""
    processor = open_processor(directory("llava_onevision"))
    processor.tile, processor.grid, processor.most_tiles = 384, 27, 9
    processor.pinpoints = [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)]
    processor.images.image_grid_pinpoints = processor.pinpoints
    stock = object.__new__(LlavaOnevisionProcessor)  # its constructor wants a video processor, and that torchvision
    stock.image_processor, stock.num_image_tokens = processor.images, processor.grid**2
    stock.vision_aspect_ratio = "anyres_max_9"
    rng = np.random.default_rng(0)
    counts = set()
    for height, width in [*SIZES, *rng.integers(20, 2500, (200, 2)).tolist()]:
        count = processor.features(height, width)
        assert count == stock._get_number_of_features(height, width, processor.tile, processor.tile), (height, width)
        counts.add(count)
    assert len(counts) > 50


def test_internvl_tiles():
    """A thumbnail follows where there is more than one tile, and each is written between its marks."""
    processor, _ = loaded("internvl")
    for size in SIZES:
        tiles = processor.images.get_number_of_image_patches(*size)
        (text,), pixels = processor.look([picture(*size)])
        assert text == "<img>" + "<IMG_CONTEXT>" * 4 * tiles + "</img>"
        assert pixels["pixel_values"].shape == (tiles, 3, 28, 28)
    assert processor.images.get_number_of_image_patches(28, 60) == 3


def test_internvl_templates_of_the_first_conversions(tmp_path):
    """They write <image>, which is no token; the same ids come out."""
    processor = open_processor(directory("internvl"))
    ids = processor.ask(conversations()[:1])[0].ids
    first = open_processor(directory("internvl"))
    first.tokenizer.chat_template = first.tokenizer.chat_template.replace("<IMG_CONTEXT>", "<image>")
    first.IMAGE = "<image>"
    assert first.ask(conversations()[:1])[0].ids == ids


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_on_the_answer_and_its_end(family):
    processor, _ = loaded(family)
    turns = [*conversations()[0], {"role": "assistant", "content": "a red ball"}]
    (asked,), (taught,) = processor.ask([turns[:1]]), processor.teach([turns])
    first = taught.loss.index(True)
    assert taught.ids[:first] == asked.ids and all(taught.loss[first:]) and not any(asked.loss)
    end = "</s>" if family == "llava" else "<|im_end|>"
    assert processor.tokenizer.decode(taught.ids[first:]).strip() == f"a red ball{end}"
    assert (taught.ids[0] == processor.tokenizer.convert_tokens_to_ids("<s>")) == (family == "llava")


def test_questions_about_one_image_share_its_pixels():
    processor, _ = loaded("llava")
    image = picture(40, 60)
    turns = [[*user(image, text), {"role": "assistant", "content": "yes"}] for text in ("Is it?", "Was it?")]
    first, second = processor.teach(turns)
    assert first.pixels is second.pixels and first.ids != second.ids


def test_padding():
    processor, _ = loaded("llava")
    turns = [[*user(text), {"role": "assistant", "content": "yes"}] for text in ("Is it?", "Was it there before?")]
    rows = processor.teach(turns)
    short, long = (len(row.ids) for row in rows)
    for side, span in (("left", slice(long - short, long)), ("right", slice(0, short))):
        inputs, labels = processor.batch(rows, side)
        assert inputs["input_ids"].shape == labels.shape == (2, long)
        assert inputs["input_ids"][0, span].tolist() == rows[0].ids
        assert inputs["attention_mask"][0].sum() == short and inputs["attention_mask"][0, span].all()
        assert (labels != IGNORED).sum(1).tolist() == [sum(row.loss) for row in rows]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_image_token_in_the_text(family):
    processor, _ = loaded(family)
    with pytest.raises(UserError, match="1 image.s. in a conversation with 2 times"):
        processor.ask([user(picture(40, 40), f"What is {processor.IMAGE}?")])


# ---------------------------------------------------------------- under training


def tuned(family: str, **model):
    config = schema.default("sft")
    config.model.update(path=str(directory(family)), **model)
    return Tuned.load(directory(family), schema.resolve(config))


def loss_and_gradients(made: Tuned, family: str):
    processor, _ = loaded(family)
    rows = processor.teach([[*each, {"role": "assistant", "content": "red"}] for each in conversations()[:3]])
    loss = made.loss(*processor.batch(rows, "right"))
    loss.backward()
    return float(loss.detach()), {name: p.grad.clone() for name, p in made.trained.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_is_transformers_own(family):
    """Logits of the supervised places alone, against the model's loss over all of them."""
    processor, model = loaded(family)
    rows = processor.teach([[*each, {"role": "assistant", "content": "red"}] for each in conversations()[:3]])
    inputs, labels = processor.batch(rows, "right")
    with torch.no_grad():
        mean = model(**inputs, labels=labels).loss
    loss, gradients = loss_and_gradients(tuned(family), family)
    assert loss == pytest.approx(float(mean) * int((labels != IGNORED).sum()), rel=1e-5)
    assert all(gradient.abs().sum() > 0 for gradient in gradients.values())


def test_recomputing_and_bfloat16():
    family = "llava_onevision"
    plain, gradients = loss_and_gradients(tuned(family, remat="none"), family)
    made = tuned(family, remat="full")
    assert made.model.model.language_model.is_gradient_checkpointing
    again, same = loss_and_gradients(made, family)
    assert again == pytest.approx(plain, rel=1e-6)
    assert all(torch.allclose(same[name], gradients[name], atol=1e-6, rtol=1e-4) for name in gradients)

    made = tuned(family, compute_dtype="bfloat16")
    half, rough = loss_and_gradients(made, family)
    assert half == pytest.approx(plain, rel=0.03) and half != plain
    assert all(p.dtype == torch.float32 for p in made.trained.values())
    assert all(p.dtype == torch.bfloat16 for name, p in made.model.named_parameters() if name not in made.trained)
    assert all(buffer.dtype != torch.bfloat16 for buffer in made.model.buffers()), "rotary frequencies stay exact"
    difference = sum(float((rough[name] - gradients[name]).norm() ** 2) for name in gradients) ** 0.5
    assert difference < 0.1 * sum(float(g.norm() ** 2) for g in gradients.values()) ** 0.5


def test_all_towers_learn_where_asked():
    made = tuned("llava", trainable="all")
    assert set(made.trained) == {name for name, _ in made.model.named_parameters()}
    assert not any("vision" in name or "projector" in name for name in tuned("llava").trained)
