"""Decoding, beside transformers' tokens in tests/models: how often it compiles, sampling, devices, rows that end."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import latent_jax
from latent_jax.data.prompt_batch import bucket
from latent_jax.errors import UserError
from latent_jax.inference import batches, decode
from tests.reference.checkpoints import saved
from tests.reference.conversations import STILLS, picture, user

NEW = 16
WORDS = [user("What is " + "left of the red ball and " * n + "right of the cube?") for n in range(12)]


@pytest.fixture(scope="module")
def vlm():
    return latent_jax.load(saved("first_full_tied")[0])


def sampled(vlm, conversations, **options):
    return vlm.generate_ids(conversations, NEW, **dict(temperature=1.0, top_p=0.9, seed=5) | options)


def test_lengths_share_programs(vlm):
    """Twelve prompts of different lengths and six limits: two programs read and two write."""
    prompts = [len(vlm.processor.lay_out(vlm.processor.render(messages, True)).tokens) for messages in WORDS]
    assert len(set(prompts)) == len(prompts) and max(prompts) <= 2 * bucket(max(prompts) // 2 + 1, 32)
    programs = (decode.prefill, decode.decode)
    before = [program._cache_size() for program in programs]
    free = [vlm.generate_ids([messages], NEW) for messages in WORDS]
    read, write = (program._cache_size() - old for program, old in zip(programs, before))
    buckets = len({bucket(length, 32) for length in prompts})
    assert buckets < 6 and (read, write) == (buckets, buckets)
    for limit in range(1, NEW):
        assert vlm.generate_ids([WORDS[0]], limit) == [free[0][0][:limit]]
    assert decode.prefill._cache_size() - before[0] == read and decode.decode._cache_size() - before[1] == write


def test_temperatures_share_a_program(vlm):
    sampled(vlm, WORDS[:1])
    before = decode.decode._cache_size()
    answers = {
        str(sampled(vlm, WORDS[:1], temperature=t, top_p=p, seed=s)) for t, p, s in ((0.5, 0.3, 1), (2, 0.99, 7))
    }
    assert len(answers) == 2 and decode.decode._cache_size() == before


def test_sampling_in_a_batch_is_sampling_alone(vlm):
    batch = [WORDS[0], STILLS[1], WORDS[2]]
    together = sampled(vlm, batch)
    assert together == [sampled(vlm, [messages])[0] for messages in batch]
    assert together[::-1] == sampled(vlm, batch[::-1])
    assert together != sampled(vlm, batch, seed=6)
    assert together != vlm.generate_ids(batch, NEW)


def test_equal_prompts_get_different_answers(vlm):
    first, second, other, third = sampled(vlm, [WORDS[2], WORDS[2], WORDS[1], WORDS[2]])
    assert len({tuple(each) for each in (first, second, third)}) == 3
    assert [first] == sampled(vlm, [WORDS[2]]) and [other] == sampled(vlm, [WORDS[1]])
    # The words agree and the pictures do not.
    seen = sampled(vlm, [user(picture(56, 56, seed), "What?") for seed in (1, 2)], temperature=50.0, top_p=1.0)
    assert seen[0] != seen[1]


def test_a_small_nucleus_is_greedy(vlm):
    assert sampled(vlm, WORDS[:2], top_p=1e-6) == vlm.generate_ids(WORDS[:2], NEW)
    assert sampled(vlm, WORDS[:2], temperature=1e-9, top_p=1.0) == vlm.generate_ids(WORDS[:2], NEW)
    assert sampled(vlm, WORDS[:2], temperature=0.0) == vlm.generate_ids(WORDS[:2], NEW)


def test_first_tokens_follow_the_logits(vlm):
    """One prompt many times over: each is drawn on its own."""
    draws, temperature = 400, 0.7
    logits = vlm.logits(WORDS[0])[-1].astype(np.float64) / temperature
    want = np.exp(logits - logits.max())
    want /= want.sum()
    tokens = [ids[0] for ids in vlm.generate_ids([WORDS[0]] * draws, 1, temperature=temperature, seed=1)]
    counts = np.bincount(tokens, minlength=len(want))
    top = np.argsort(-want)[:4]
    spread = np.sqrt(draws * want * (1 - want))
    assert np.all(np.abs(counts - draws * want)[top] < 5 * spread[top] + 1)


def test_copies_share_a_batch(vlm):
    """One prompt stands in both shares: it still gets two answers, and those that one device gives."""
    batch = [WORDS[0], STILLS[2], STILLS[1], WORDS[0], WORDS[1]]
    shared = latent_jax.load(saved("first_full_tied")[0], devices=jax.devices()[1:3])
    found = sampled(shared, batch)
    assert found == sampled(vlm, batch) and found[0] != found[3]


def test_rows_that_ended_are_left_behind(vlm):
    """Nine prompts, of which two go on for longer than the others: in a smaller program, and as before."""
    examples = vlm.prompts([*WORDS[:8], STILLS[1]]).examples
    nothing, options = jnp.zeros((1, 160)), dict(temperature=0.8, seed=2)

    def run(eos):
        found = batches.answers((vlm.model,), examples, nothing, eos, max_new_tokens=NEW, **options)
        return [answer.ids for answer in found]

    free = run((-1,))
    spared = {*free[3][:10], *free[8][:10]}
    ends = [next((token for token in ids if token not in spared), -1) for ids in free]
    eos = tuple(sorted({*ends, -1}))
    want = [ids[: next((i + 1 for i, token in enumerate(ids) if token in eos), NEW)] for ids in free]
    most = sorted(map(len, want))
    assert most[-3] < most[-1], "the answers are too much alike for this test"
    before = decode.keep_rows._cache_size()
    assert run(eos) == want
    assert decode.keep_rows._cache_size() == before + 1, "no row was left behind"


def test_values_out_of_range(vlm):
    for options, name in (
        (dict(temperature=-0.1), "temperature"),
        (dict(temperature=float("nan")), "temperature"),
        (dict(top_p=0.0), "top_p"),
        (dict(top_p=1.01), "top_p"),
        (dict(seed=-1), "seed"),
        (dict(max_new_tokens=0), "max_new_tokens"),
    ):
        with pytest.raises(UserError, match=f"^{name}: got"):
            vlm.generate(WORDS[:1], **options)
    assert vlm.generate([]) == []
