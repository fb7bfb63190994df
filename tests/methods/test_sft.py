"""Supervised fine-tuning: packed questions that share an image, against torch on every conversation alone."""

import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from latent_jax.benchmarks import scienceqa
from latent_jax.config import schema
from latent_jax.data.packing import BatchShape, Packer
from latent_jax.errors import UserError
from latent_jax.methods import sft
from latent_jax.models.heads import LatentVLM
from tests.reference import latent, ours
from tests.reference.checkpoints import saved
from tests.reference.conversations import picture
from tests.reference.theirs import Processor

NAME = "small_patches"
SIZES = [(48, 80), (64, 64), (32, 96)]
PAIRS = [
    [("What colour is the ball?", "red"), ("How many cones?", "two small ones"), ("Is there a star?", "no")],
    [("Where is the cube?", "left of the cone")],
    [],
]


def make_config(**chat):
    config = schema.default("sft")
    config.model.remat, config.data.image_patches = "none", 128
    config.chat.update(suffix=" Answer in one word.", **chat)
    return schema.resolve(config)


def records() -> list[dict]:
    made = []
    for i, (size, pairs) in enumerate(zip(SIZES, PAIRS, strict=True)):
        buffer = io.BytesIO()
        picture(*size, seed=i).save(buffer, "png")
        questions = [{"id": str(n), "question": q, "answer": a} for n, (q, a) in enumerate(pairs)]
        made.append({"key": f"r{i}", "images": [buffer.getvalue()], "captions": ["a red ball"], "questions": questions})
    return made


def conversations() -> list[tuple[list[dict], str]]:
    """Every question, and the caption where there is none, as a conversation of its own with what it answers."""
    found = []
    for i, pairs in enumerate(PAIRS):
        image = {"type": "image", "image": picture(*SIZES[i], seed=i)}
        pairs = [(f"{question} Answer in one word.", answer) for question, answer in pairs]
        for question, answer in pairs or [("Describe the image.", "a red ball")]:
            content = [image, {"type": "text", "text": question}]
            found.append(([{"role": "user", "content": content}], answer))
    return found


@functools.cache
def packed():
    loaded, config = ours.load(saved(NAME)[0]), make_config()
    packer = Packer(
        BatchShape(
            micro=1, groups=1, rows=2, tokens=192, patches=320, examples=4, channels=192, slots=0, image_patches=128
        )
    )
    for i, record in enumerate(records()):
        assert packer.add(loaded.processor.lay_out(sft.layout(record, i, config, loaded.processor))) is None
    return {key: jnp.asarray(value[0]) for key, value in packer.flush().items()}


def test_packed_views_equal_the_conversations_one_by_one():
    directory, model = saved(NAME)
    loaded, config, batch = ours.load(directory), make_config(), packed()
    run = jax.jit(
        lambda arrays: sft.loss(LatentVLM(loaded.structure.build(arrays), None), batch, config),
        compiler_options=ours.QUICK,
    )
    terms, metrics = run(loaded.arrays)

    total = tokens = correct = 0
    for turns, answer in conversations():
        said = [*turns, {"role": "assistant", "content": answer}]
        inputs = Processor.of(directory)([said], add_generation_prompt=False)
        start = Processor.of(directory)([turns])["input_ids"].shape[1]
        count = len(loaded.processor.tokenizer(answer)["input_ids"]) + 1  # and the end of the turn
        with torch.no_grad():
            logits = model(**inputs).logits[0, start - 1 : start - 1 + count].numpy()
        want = inputs["input_ids"][0, start : start + count].numpy()
        total, tokens = total + latent.cross_entropy(logits, want), tokens + count
        correct += int((logits.argmax(-1) == want).sum())
    np.testing.assert_allclose(terms["next_token"][0], total, rtol=1e-4)
    assert float(terms["next_token"][1]) == tokens == float(sft.weights(batch, config)["next_token"])
    assert tuple(map(float, metrics["next_token/accuracy"])) == (correct, tokens)
    assert terms.keys() == sft.coefficients(config, jnp.float32(0)).keys()


def test_an_image_is_encoded_once_for_all_its_questions():
    patches = sum(rows * columns // 64 for rows, columns in SIZES)
    assert int((packed()["patch_image"] > 0).sum()) == patches


def test_questions_are_drawn_without_repeats_by_seed_and_index():
    loaded, record = ours.load(saved(NAME)[0]), records()[0]

    def answers(index, **chat):
        views = sft.layout(record, index, make_config(**chat), loaded.processor).views
        return ["".join(part.text for part in view if part.loss).removesuffix("<|im_end|>") for view in views]

    assert answers(0) == answers(0)
    assert sorted(answers(0)) == ["no", "red", "two small ones"]
    drawn = [answers(index, questions=2) for index in range(12)]
    assert all(len(set(each)) == 2 for each in drawn)
    assert {answer for each in drawn for answer in each} == {"no", "red", "two small ones"}


def test_a_benchmarks_questions_are_put_as_its_evaluation_puts_them():
    question = {"question": "Which?", "choices": ["ball", "cube"], "answer": 1, "hint": "", "subject": "", "grade": ""}
    record = {"key": "1", "images": [], "questions": [question], "dataset": "scienceqa"}
    [(prompt, answer)] = sft.pairs(record, 0, make_config())
    assert (prompt, answer) == (scienceqa.prompt(question, "official"), "B") and "B. cube" in prompt
    plain = {**record, "questions": [{"question": "Which?", "answer": "cube"}]}
    assert sft.pairs(plain, 0, make_config(prompt="plain")) == [("Which? Answer in one word.", "cube")]
    hidden = {"question": "Which?", "prompt": "Which?", "choices": ["a", "b"], "answer": "hidden", "sub_task": "Jigsaw"}
    with pytest.raises(UserError, match="record '1': none of its questions has an answer to learn"):
        sft.pairs({**record, "dataset": "blink", "questions": [hidden]}, 0, make_config())
