"""What imagine parts stand for: the same for a conversation alone and in a batch, and what interventions put there."""

import dataclasses

import jax
import numpy as np
import pytest

from latent_jax.data import prompt_batch
from latent_jax.data.layout import Layout, Slots
from latent_jax.errors import UserError
from latent_jax.inference import decode
from latent_jax.inference.vlm import VLM
from tests.reference.imagining import GRID, SILENT, facade, picture, user

CONVERSATIONS = [
    user(picture(0), "What color is it?", SILENT),
    user("Is there a ball?"),
    user({"type": "imagine", "text": "a red ball"}, "and", {"type": "imagine", "text": "a blue cube"}, "alike?"),
    user(picture(1), "And here, what is to be seen at all?", SILENT, "Say it."),
]


@jax.jit
def hidden_states(model, batch, given):
    return model.vlm.decode(decode.embed(model.vlm, batch, given, 32), batch)[0][0, 0]


def in_context(messages) -> np.ndarray:
    """Latents of the one silent part, from a sequence of its own that ends with the slots."""
    vlm = facade()
    shown = vlm.processor.render(messages, imagined_grid=(GRID, GRID))
    end = next(i for i, part in enumerate(shown.trunk) if isinstance(part, Slots))
    example = vlm.processor.lay_out(Layout(shown.images, (*shown.trunk[:end], Slots((GRID, GRID)))))
    laid = prompt_batch.one_per_row([example], vlm.config)
    hidden = hidden_states(vlm.model, laid.batch, vlm.model.head.slots[...])
    return np.asarray(vlm.model.head.unstandardise(vlm.model.head(hidden[example.slots])))


def thoughts(conversations) -> list:
    return [thought for own in facade().think(conversations) for thought in own]


def test_a_batch_of_all_kinds_has_each_ones_own_latents():
    found = [thought.latents for thought in thoughts(CONVERSATIONS)]
    expected = [
        in_context(CONVERSATIONS[0]),
        facade().imagine("a red ball"),
        facade().imagine("a blue cube"),
        in_context(CONVERSATIONS[3]),
    ]
    np.testing.assert_allclose(found, np.stack(expected), rtol=1e-4, atol=1e-5)
    assert np.abs(expected[0] - expected[3]).max() > 0.01  # the context matters
    assert [len(own) for own in facade().think(CONVERSATIONS)] == [1, 0, 2, 1]


def test_copies_of_the_model_share_what_is_thought():
    shared = dataclasses.replace(facade(), copies=tuple(jax.device_put(facade().model, d) for d in jax.devices()[:3]))
    found = [thought for own in shared.think(CONVERSATIONS) for thought in own]
    for one, other in zip(found, thoughts(CONVERSATIONS), strict=True):
        np.testing.assert_allclose(one.latents, other.latents, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(one.inputs, other.inputs, rtol=1e-4, atol=1e-5)


def test_answers_in_a_batch_are_those_alone():
    together = facade().generate_ids(CONVERSATIONS, max_new_tokens=4)
    assert together == [facade().generate_ids([messages], max_new_tokens=4)[0] for messages in CONVERSATIONS]


def test_what_is_given_stands_in_the_place_of_what_the_model_thinks():
    vlm = facade()
    own = [[thought.inputs for thought in each] for each in vlm.think(CONVERSATIONS)]
    assert vlm.generate_ids(CONVERSATIONS, 4, thoughts=own) == vlm.generate_ids(CONVERSATIONS, 4)
    other = [[np.zeros_like(array) for array in each] for each in own]
    examples, given = vlm.prompts(CONVERSATIONS, other)
    assert given.shape == (4 * GRID**2, 64) and not given.any()
    assert [e.tokens.tolist() for e in examples] == [e.tokens.tolist() for e in vlm.prompts(CONVERSATIONS).examples]
    found = vlm.prompts(CONVERSATIONS, own).given
    assert np.array_equal(found, np.concatenate([array for each in own for array in each]))


def test_nothing_given_leaves_the_parts_out():
    plain = [user(picture(0), "What color is it?"), user("Is there a ball?")]
    found, want = facade().prompts(CONVERSATIONS[:2], [(), ()]), facade().prompts(plain)
    assert not len(found.given) and not len(want.given)
    for one, other in zip(found.examples, want.examples, strict=True):
        assert one.tokens.tolist() == other.tokens.tolist()


def test_scores_are_log_likelihoods_of_the_answers_tokens():
    """By hand: one answer at a time, the softmax of the logits of the prompt with the answer's first tokens."""
    vlm, answers = facade(), ["red", "yes, a small one", "no", "a ball"]
    found = vlm.score(CONVERSATIONS, answers)
    for messages, answer, scores in zip(CONVERSATIONS, answers, found, strict=True):
        examples, given = vlm.prompts([messages], None, [answer])
        rows_ = prompt_batch.one_per_row(examples, vlm.config)
        hidden = hidden_states(vlm.model, rows_.batch, given)
        logits = np.asarray(vlm.model.vlm.logits(hidden), np.float64)[: len(examples[0].tokens)]
        log = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        ids = [*vlm.processor.encode(answer).ids, vlm.processor.encode("<|im_end|>").ids[0]]
        first = len(examples[0].tokens) - len(ids) - 1  # the newline behind the end of the turn is not said
        assert examples[0].tokens[first:-1].tolist() == ids
        np.testing.assert_allclose(scores, [log[first + i - 1, token] for i, token in enumerate(ids)], atol=1e-4)
    alone = [vlm.score([messages], [answer])[0] for messages, answer in zip(CONVERSATIONS, answers, strict=True)]
    for one, other in zip(found, alone, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
    swapped = vlm.score(CONVERSATIONS, answers, [[np.ones((4, 64), np.float32)], (), [], ()])
    assert np.abs(swapped[0] - found[0]).max() > 1e-3 and np.abs(swapped[1] - found[1]).max() < 1e-4


@pytest.mark.parametrize(
    ("conversations", "given", "message"),
    [
        ([user({"type": "imagine", "text": " "})], None, "holds no text"),
        ([user(SILENT, {"type": "imagine", "text": "a ball"})], None, "expected it to be its conversation's only one"),
        ([user(SILENT)], [], "thoughts: got those of 0 conversations, expected 1"),
        ([user(SILENT)], [[np.zeros((4, 64))] * 2], "thoughts of conversation 0: got 2, expected none or 1"),
        ([user(SILENT)], [[np.zeros((3, 64))]], r"shape \(3, 64\), expected \(4, 64\) finite numbers"),
        ([user(SILENT)], [[np.full((4, 64), np.nan)]], r"expected \(4, 64\) finite numbers"),
        ([user({**SILENT, "grid": [3, 3]})], None, "an 'imagine' part's grid is"),
    ],
)
def test_bad_parts_and_arrays_are_named(conversations, given, message):
    with pytest.raises(UserError, match=message):
        facade().prompts(conversations, given)


def test_a_variant_that_the_method_lacks_is_named():
    with pytest.raises(UserError, match="variant: got 'posterior', expected one of own"):
        facade().think([user(SILENT)], variant="posterior")


def test_a_model_without_a_head_says_so():
    vlm = VLM(facade().model.__class__(facade().model.vlm, None), facade().processor, None, (574,), "plain")
    with pytest.raises(UserError, match="plain: has no latent head"):
        vlm.think([user("a", SILENT)])
    assert len(vlm.generate([user("a")], max_new_tokens=2)) == 1
