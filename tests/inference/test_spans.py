"""Latents inside answers, beside a slow decoder of one prompt that has no cache and asks one thing after another."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import latent_jax
from latent_jax.data.prompt_batch import next_position, one_per_row
from latent_jax.errors import UserError
from latent_jax.inference import batches, decode
from latent_jax.inference.spans import Writing, counted
from latent_jax.methods.contract import Span
from latent_jax.models.heads import LatentVLM
from tests.reference.checkpoints import saved, token_ids
from tests.reference.conversations import STILLS, user

NEW = 24
MARK, SEED = 0.5, 1  # size and draw of the opening mark's embedding: with these the answers differ as the tests need
ROOM = 256  # tokens of a prompt and its answer, for the reference
PROMPTS = [*STILLS[:3], *(user("What is " + "left of the red ball and " * n + "right of it?") for n in range(9))]


class Head(nnx.Module):
    def __init__(self, hidden: int):
        self.mix = nnx.Param(jax.random.normal(jax.random.key(3), (hidden, hidden)) / hidden**0.5)


def feed(model, hidden, carry, i, config):
    latents = hidden @ model.head.mix[...] + carry + i[:, None]
    return latents, 0.2 * jnp.tanh(latents), 0.5 * carry + 0.1 * latents


def start(model, batch, merged, config):
    """Something of each prompt alone: a sum over its token ids, spread over the channels."""
    owners, R = batch["segment_ids"][0], batch["number"].shape[1]
    sums = jnp.zeros(R + 1).at[owners.reshape(-1)].add(batch["tokens"][0].reshape(-1) % 7)[1:]
    return jnp.tile(sums[:, None] * 1e-2, (1, model.vlm.config.text.hidden_size))


def shape(example, config):
    """As text after words alone, a grid of another size after pictures."""
    return (2, 3 - len(example.tokens) % 2) if len(example.patches) else 2 + len(example.tokens) % 3


def after_three(tokens, count, config):
    """Opens once, behind the third token."""
    return jnp.full(len(tokens), count == 3)


SPAN = Span(most=lambda config: 6, shape=shape, feed=feed, start=start, kept=2)
RULED = dataclasses.replace(SPAN, rule=after_three)


@pytest.fixture(scope="module")
def vlm():
    """A random model whose opening mark is likelier than most tokens, so that some answers have it."""
    found = latent_jax.load(saved("first_full_tied")[0], dtype="float32")
    text, mark = found.model.vlm.text, found.config.vision_start_token_id
    table = np.array(text.embed[...])
    table[mark] = MARK * np.random.default_rng(SEED).normal(size=table.shape[1])
    text.embed[...] = jnp.asarray(table)
    return dataclasses.replace(found, model=LatentVLM(found.model.vlm, Head(table.shape[1])))


def answers(vlm, conversations, span=SPAN, new=NEW, keep=True, inside=None, **options):
    examples, given = vlm.prompts(conversations, [()] * len(conversations))
    return batches.answers(
        (vlm.model,), examples, given, vlm.eos, max_new_tokens=new, writing=Writing(span, "config", keep),
        inside=inside, **options,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames="patches")
def prompt_inputs(model, batch, given, patches):
    return decode.embed(model.vlm, batch, given, patches)[0, 0]


@jax.jit
def hidden_states(model, x, positions):
    batch = {"positions": positions, "segment_ids": jnp.ones(x.shape[:3], jnp.int32)}
    return model.vlm.decode(x, batch | {"view_ids": jnp.zeros(x.shape[:3], jnp.int32)})[0][0, 0]


def slow(vlm, conversation, span=SPAN, new=NEW, given=None):
    """(token ids, [(latents, inputs) of every span]) of one prompt: its whole sequence is read anew for every token."""
    config, model = vlm.config, vlm.model
    examples, nothing = vlm.prompts([conversation], [()])
    (example,), rows = examples, one_per_row(examples, vlm.config)
    length = len(example.tokens)
    x = [np.asarray(e) for e in prompt_inputs(model, rows.batch, nothing, rows.image_patches)[:length]]
    positions = list(example.positions.T)
    carry = span.start(model, rows.batch, None, "config")
    wanted = span.shape(example, "config")
    count, columns = (wanted, 0) if isinstance(wanted, int) else (wanted[0] * wanted[1], wanted[1])
    base, ids, spans, place = next_position(example), [], [], 0
    while len(ids) < new:
        padded, places = np.zeros((ROOM, x[0].size), np.float32), np.zeros((3, ROOM), np.int32)
        padded[: len(x)], places[:, : len(x)] = x, np.transpose(positions)
        states = hidden_states(model, padded[None, None], places[None, None])
        hidden = states[len(x) - 1]
        if place and place <= count:  # a latent is due
            latents, inputs, carry = span.feed(model, hidden[None], carry, jnp.array([place - 1]), "config")
            if given is not None:
                inputs = given[min(len(spans), len(given)) - 1][None, place - 1]
            spans[-1].append((np.asarray(latents[0]), np.asarray(inputs[0])))
            where = (0, (place - 1) // columns, (place - 1) % columns) if columns else (place - 1,) * 3
            ids.append(config.image_token_id)
            x.append(np.asarray(inputs[0]))
            positions.append(np.array(where) + base)
            place += 1
            continue
        if place:
            token = config.vision_end_token_id
            base += max(wanted) if columns else count
            place = 0
        else:
            logits = np.array(model.vlm.logits(hidden[None])[0])
            if given == ():
                logits[config.vision_start_token_id] = -np.inf
            token = int(logits.argmax())
            if span.rule is not None and len(ids) == 3 and given != ():
                token = config.vision_start_token_id
            if token == config.vision_start_token_id:
                place = 1
                spans.append([])
        ids.append(token)
        x.append(np.asarray(model.vlm.text.embed[...][token]))
        positions.append(np.full(3, base))
        base += 1
        if token in vlm.eos:
            break
    return ids, spans


def latents_read(ids):
    """How many latents of each kept span the model has read: it has not read the newest token."""
    counts, marks = [], token_ids()
    for token in ids[:-1]:
        if token == marks["<|vision_start|>"]:
            counts.append(0)
        elif token == marks["<|image_pad|>"]:
            counts[-1] += 1
    return counts[: SPAN.kept]


def check_equal(found, want, spans):
    assert found.ids == want
    fed = latents_read(found.ids)
    assert [len(latents) for latents, _ in found.spans] == [len(inputs) for _, inputs in found.spans] == fed
    for (latents, inputs), each in zip(found.spans, spans):
        for i, (latent, fed) in enumerate(each[: len(latents)]):
            np.testing.assert_allclose(latents[i], latent, atol=2e-4)
            np.testing.assert_allclose(inputs[i], fed, atol=2e-5)


def test_a_batch_of_mixed_answers_is_each_one_slowly(vlm):
    """Some open a span and some none, at different steps; some open two; some never close; texts and grids."""
    found = answers(vlm, PROMPTS)
    counts = [counted(vlm.config, answer.ids) for answer in found]
    assert {0, 1, 2} <= {opened for opened, _ in counts} and any(opened > closed for opened, closed in counts)
    starts = {answer.ids.index(vlm.config.vision_start_token_id) for answer in found if answer.spans}
    assert len(starts) > 2 and any(len(example.patches) for example in vlm.prompts(PROMPTS).examples)
    for conversation, answer in zip(PROMPTS, found, strict=True):
        check_equal(answer, *slow(vlm, conversation))


def test_a_batch_is_each_alone(vlm):
    """Whatever the order, greedily and sampled."""
    chosen = [PROMPTS[1], *PROMPTS[4:6], PROMPTS[10]]
    together = [answer.ids for answer in answers(vlm, chosen)]
    assert together == [answers(vlm, [conversation])[0].ids for conversation in chosen]
    assert together[::-1] == [answer.ids for answer in answers(vlm, chosen[::-1])]
    sampled = dict(temperature=1.0, seed=4)
    drawn = [answer.ids for answer in answers(vlm, chosen[1:], **sampled)]
    assert drawn == [answers(vlm, [conversation], **sampled)[0].ids for conversation in chosen[1:]]
    for ids in (together, drawn):
        assert len({counted(vlm.config, each) for each in ids}) > 1


def test_fewer_tokens_cut_an_answer_short(vlm):
    """Also inside a span, whose latents are then those that were fed."""
    whole = answers(vlm, PROMPTS[5:7])
    for new in range(1, NEW):
        for short, answer in zip(answers(vlm, PROMPTS[5:7], new=new), whole, strict=True):
            assert short.ids == answer.ids[:new]
            assert [len(inputs) for _, inputs in short.spans] == latents_read(short.ids)


def test_writing_comes_with_its_rows(vlm):
    examples, given = vlm.prompts(PROMPTS[:1], [()])
    laid, writing = one_per_row(examples, vlm.config), Writing(SPAN, "config")
    with pytest.raises(ValueError, match="expected both, or neither"):
        decode.generate(vlm.model, laid, given, vlm.eos, max_new_tokens=1, writing=writing)


def test_no_program_for_another_length(vlm):
    """Fifty prompts of different lengths in one bucket of them, whatever their spans."""
    prompts = [user("one " * n + "What?") for n in range(50)]
    lengths = {len(example.tokens) for example in vlm.prompts(prompts).examples}
    assert len(lengths) == 50
    programs = (decode.prefill, decode.begin, decode.decode)
    answers(vlm, prompts[:1])
    answers(vlm, prompts[-1:])
    before = [program._cache_size() for program in programs]
    middle = [prompt for prompt in prompts if len(vlm.prompts([prompt]).examples[0].tokens) > 64]
    for prompt in prompts:
        answers(vlm, [prompt])
    after = [program._cache_size() for program in programs]
    assert after[0] - before[0] <= 2, (before, after, len(middle))


def test_a_rule_opens_where_the_model_would_not(vlm):
    found = answers(vlm, PROMPTS[:6], RULED)
    for conversation, answer in zip(PROMPTS[:6], found, strict=True):
        assert vlm.config.vision_start_token_id in answer.ids[:4]
        check_equal(answer, *slow(vlm, conversation, RULED))


def test_a_rule_has_no_say_over_an_answer_that_may_not_open(vlm):
    found = answers(vlm, PROMPTS, RULED, inside=[()] * len(PROMPTS))
    assert all(counted(vlm.config, answer.ids) == (0, 0) for answer in found)
    for conversation, answer in zip(PROMPTS[:4], found):
        check_equal(answer, *slow(vlm, conversation, RULED, given=()))


def test_given_inputs_are_fed_in_the_models_place(vlm):
    """In the rows that have some, and in no other; the last of them in all spans that follow."""
    chosen = PROMPTS[3:7]
    rng = np.random.default_rng(0)
    counts = [SPAN.shape(example, "config") for example in vlm.prompts(chosen).examples]
    own = [
        [rng.normal(size=(count, 160)).astype(np.float32) * 0.3 for _ in range(1 + number % 2)]
        for number, count in enumerate(counts)
    ]
    own[2] = None
    found = answers(vlm, chosen, inside=own)
    free = answers(vlm, chosen)
    assert found[2].ids == free[2].ids and any(a.ids != b.ids for a, b in zip(found, free))
    for conversation, given, answer in zip(chosen, own, found, strict=True):
        check_equal(answer, *slow(vlm, conversation, given=given))


def test_a_models_own_inputs_given_back_change_nothing(vlm):
    free = answers(vlm, PROMPTS)
    whole = [vlm.prompts([prompt]).examples[0] for prompt in PROMPTS]
    sizes = [np.prod(SPAN.shape(example, "config")) for example in whole]
    own = [
        [inputs for _, inputs in answer.spans if len(inputs) == size] or None
        for answer, size in zip(free, sizes, strict=True)
    ]
    again = answers(vlm, PROMPTS, inside=own)
    two = [number for number, given in enumerate(own) if given and len(given) == len(free[number].spans)]
    assert two
    for number in two:
        assert again[number].ids == free[number].ids


def test_words_alone_are_as_without_spans(vlm):
    """A model that may open no span says what it says without any method, but for the mark itself."""
    examples, given = vlm.prompts(PROMPTS, [()] * len(PROMPTS))
    plain = batches.answers((vlm.model,), examples, given, vlm.eos, max_new_tokens=NEW)
    shut = answers(vlm, PROMPTS, inside=[()] * len(PROMPTS))
    mark = vlm.config.vision_start_token_id
    for a, b in zip(plain, shut, strict=True):
        until = a.ids.index(mark) if mark in a.ids else len(a.ids)
        assert a.ids[:until] == b.ids[:until] and mark not in b.ids and a.spans == []


def test_copies_share_a_batch(vlm):
    """The head travels with every copy of the model."""
    copies = tuple(jax.device_put(vlm.model, device) for device in jax.devices()[1:3])
    examples, given = vlm.prompts(PROMPTS, [()] * len(PROMPTS))
    found = batches.answers(copies, examples, given, vlm.eos, max_new_tokens=NEW, writing=Writing(SPAN, "config", True))
    for one, other in zip(found, answers(vlm, PROMPTS), strict=True):
        assert one.ids == other.ids and len(one.spans) == len(other.spans)


@pytest.mark.parametrize(
    "given, message",
    [
        ([np.zeros((3, 160))] * 3, "span 2 of a conversation"),
        ([np.zeros((7, 160))], r"array of shape \(7, 160\)"),
        ([np.zeros((3, 5))], r"array of shape \(3, 5\)"),
        ([np.full((3, 160), np.nan)], "finite"),
    ],
)
def test_what_cannot_be_fed_is_told(vlm, given, message):
    prompt = next(p for p in PROMPTS[3:] if SPAN.shape(vlm.prompts([p]).examples[0], "") == 3)
    with pytest.raises(UserError, match=message):
        answers(vlm, [prompt], inside=[given])


def test_a_span_of_more_latents_than_there_is_room_for_is_told(vlm):
    with pytest.raises(UserError, match="a span of 9 latents; expected 1 to 6"):
        answers(vlm, PROMPTS[3:4], dataclasses.replace(SPAN, shape=lambda example, config: 9))


def at_once(tokens, count, config):
    """Asks always."""
    return jnp.full(len(tokens), True)


def test_an_answer_that_has_ended_opens_no_span_while_others_go_on(vlm):
    """Though its row is computed on: neither of the model's own accord nor by a rule."""
    free = answers(vlm, PROMPTS)
    row = next(row for row, answer in enumerate(free) if answer.ids[0] != vlm.config.vision_start_token_id)
    end = free[row].ids[0]  # a word that some answers begin with
    examples, given = vlm.prompts(PROMPTS, [()] * len(PROMPTS))
    for rule in (lambda tokens, count, config: jnp.full(len(tokens), count > 3), None):
        writing = Writing(dataclasses.replace(SPAN, rule=rule), "config", True)
        found = batches.answers((vlm.model,), examples, given, (end,), max_new_tokens=NEW, writing=writing)
        assert found[row].ids == [end] and found[row].spans == []
        assert max(len(answer.ids) for answer in found) == NEW
        for answer in found:
            assert len(answer.spans) == len(latents_read(answer.ids))


def test_a_rule_that_always_asks_leaves_spans_alone(vlm):
    ids = answers(vlm, PROMPTS[3:4], dataclasses.replace(SPAN, rule=at_once))[0].ids
    marks = [vlm.config.vision_start_token_id, vlm.config.image_token_id, vlm.config.vision_end_token_id]
    count = SPAN.shape(vlm.prompts(PROMPTS[3:4], [()]).examples[0], "config")
    span = [marks[0], *[marks[1]] * count, marks[2]]
    assert ids == (span * NEW)[:NEW]


def counting(model, hidden, carry, i, config):
    """Carries of several kinds, one of them given back in another dtype."""
    seen, mean, rows = carry["seen"], carry["mean"], carry["pair"][0]
    latents = hidden.astype(jnp.float32) + mean.astype(jnp.float32) + seen[:, None] + rows[:, 0]
    carry = {"seen": seen + 1, "mean": mean.astype(jnp.float32) * 0.5 + 0.25, "pair": (rows * 0.5, None)}
    return latents, 0.1 * jnp.tanh(latents), carry


def several(model, batch, merged, config):
    R, D = batch["number"].shape[1], model.vlm.config.text.hidden_size
    mean = jnp.full((R, D), 0.125, jnp.bfloat16)
    return {"seen": jnp.zeros(R, jnp.int32), "mean": mean, "pair": (jnp.ones((R, 2, D), jnp.float32), None)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_carried_may_be_of_any_kind(vlm, dtype):
    """Of 33 prompts, in which rows are left out on the way, as of one; latents keep the dtype that they are made in."""
    small = dataclasses.replace(vlm, model=jax.tree.map(lambda array: array.astype(dtype), vlm.model))
    span = Span(most=lambda config: 6, shape=shape, feed=counting, start=several, rule=after_three, kept=1)
    prompts = [user("one " * n + "What?") for n in range(33)]
    found = answers(small, prompts, span, new=12)
    assert sum(len(answer.spans) for answer in found) > 20
    for answer in found:
        assert len(answer.spans) <= 1  # kept
        for latents, inputs in answer.spans:
            assert latents.dtype == np.float32 and inputs.dtype == dtype
    if dtype == "float32":  # in bf16 another batch's matmuls may round otherwise
        assert answers(small, prompts[7:8], span, new=12)[0].ids == found[7].ids


@pytest.mark.parametrize(
    "wanted", [0, -1, 7, (2, 4), (0, 2), (3, 0), (-2, -2), 2.0, (1, 2, 3), "3", None, (2.0, 2), np.zeros(2, int)]
)
def test_a_size_of_spans_that_is_none_is_told(vlm, wanted):
    with pytest.raises(UserError, match=r"a span of .* latents; expected 1 to 6"):
        answers(vlm, PROMPTS[3:4], dataclasses.replace(SPAN, shape=lambda example, config: wanted))


def test_a_size_of_spans_may_be_an_integer_of_numpy(vlm):
    for wanted in (3, (2, 2)):
        own = dataclasses.replace(RULED, shape=lambda example, config, wanted=wanted: wanted)
        numpy = dataclasses.replace(
            RULED,
            shape=lambda example, config, wanted=wanted: (
                np.int64(wanted) if isinstance(wanted, int) else tuple(np.int64(size) for size in wanted)
            ),
        )
        assert answers(vlm, PROMPTS[3:4], numpy)[0].ids == answers(vlm, PROMPTS[3:4], own)[0].ids
