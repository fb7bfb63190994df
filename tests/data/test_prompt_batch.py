"""Prompts as rows: buckets, and that a packed batch holds the same prompts as one a row."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_jax.data import packing, prompt_batch
from latent_jax.data.layout import Image, Layout, Read, Room, Slots, Text
from tests.reference import layouts
from tests.reference.small import model_config, processor


def prompts(lengths):
    """Laid-out prompts of about these many words, every third one with an image."""
    made, rng = [], np.random.default_rng(0)
    for number, words in enumerate(lengths):
        parts = [{"type": "text", "text": " ".join(["red"] * words)}]
        if number % 3 == 0:
            image = rng.integers(0, 256, (56, 56 + 28 * (number % 2), 3), np.uint8)
            parts.insert(0, {"type": "image", "image": image})
        made.append(processor().lay_out(processor().render([{"role": "user", "content": parts}], True)))
    return made


def test_buckets_hold_and_waste_little():
    for least in (1, 16, 64):
        sizes = range(1, 40 * least)
        found = [prompt_batch.bucket(size, least) for size in sizes]
        assert all(size <= held for size, held in zip(sizes, found))
        assert all(held < 1.5 * size for size, held in zip(sizes, found) if size > 2 * least)
        assert sorted(set(found)) == [
            least * n for n in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48) if n <= found[-1] // least
        ]


@pytest.mark.parametrize("lengths", [[5], [3, 40, 9, 22, 1, 30, 2, 2, 17], [60] * 5])
def test_a_packed_batch_holds_every_prompt(lengths):
    examples, config = prompts(lengths), model_config()
    plain, packed = prompt_batch.one_per_row(examples, config), prompt_batch.packed(examples, config)
    count = len(examples)
    assert plain.lengths.tolist() == [len(e.tokens) for e in examples]
    np.testing.assert_array_equal(packed.lengths[:count], plain.lengths)
    assert not packed.lengths[count:].any()
    np.testing.assert_array_equal(packed.next_position[:count], plain.next_position)
    for name in ("patches", "patch_image", "patch_window", "patch_positions"):
        np.testing.assert_array_equal(packed.batch[name], plain.batch[name])
    taken = set()
    for prompt, example in enumerate(examples):
        size = len(example.tokens)
        places, own = packed.places[prompt, :size], plain.places[prompt, :size]
        np.testing.assert_array_equal(places, np.arange(places[0], places[0] + size))
        assert not taken & set(places.tolist())
        taken |= set(places.tolist())
        for name in ("tokens", "view_ids", "feature_index"):
            np.testing.assert_array_equal(packed.batch[name].ravel()[places], plain.batch[name].ravel()[own])
        positions = [batch["positions"][0].swapaxes(1, 2).reshape(-1, 3) for batch in (packed.batch, plain.batch)]
        np.testing.assert_array_equal(positions[0][places], positions[1][own])
        assert len(set(packed.batch["segment_ids"].ravel()[places].tolist())) == 1
    ids = packed.batch["segment_ids"].ravel()
    assert set(np.flatnonzero(ids).tolist()) == taken and len(set(ids[ids > 0].tolist())) == count
    assert packed.batch["tokens"].size <= prompt_batch.bucket(count) * plain.batch["tokens"].shape[2]


def test_a_prompt_batch_is_a_training_batch():
    """The same keys, shapes and values as training's packer gives of the same examples in the same rows."""
    examples = [processor().lay_out(Layout(**shown)) for shown in MIXED]
    laid = prompt_batch.one_per_row(examples, model_config())
    R, T = laid.places.shape
    P, c = laid.batch["patches"].shape[1:]
    room = [packing.size_of(example).room for example in examples]
    most = {f.name: max(getattr(each, f.name) for each in room) for f in dataclasses.fields(Room)}
    size = dict(rows=R, tokens=T, patches=P, examples=R, channels=c, slots=0)
    batch_shape = packing.BatchShape(micro=1, groups=1, **size).with_room(Room(**most))
    assert all(2 * len(example.tokens) > T for example in examples), "each takes a row of its own"
    (trained,) = packing.batches(examples, batch_shape)
    assert laid.batch.keys() == trained.keys()
    for name, values in trained.items():
        np.testing.assert_array_equal(laid.batch[name], values[0], name)


PARTS = {
    "words": (Text("<|im_start|>What colour is the red ball left of the blue cube?" * 3, True),),
    "read": (Text("<|im_start|>" + "the ball " * 16), Read(), Text("left"), Slots(3, marks=False), Read()),
    "image": (Text("<|im_start|>" + "the ball " * 16), Image(2, loss=True, hidden=True), Text("so", late=True)),
}
MIXED = [
    dict(images=layouts.PICTURES, trunk=trunk, targets=targets, key=key)
    for (key, trunk), targets in zip(PARTS.items(), ((), (0,), (1, 2)))
]


@given(st.lists(layouts.layouts(sources=("learned", "given", "written")), min_size=1, max_size=5))
@settings(max_examples=25, deadline=None)
def test_every_prompt_is_in_the_batch_position_by_position(shown):
    """Given features follow each other in the order of the prompts, behind the slots that all prompts share."""
    examples, config = [processor().lay_out(Layout(**each)) for each in shown], model_config()
    S = max(len(example.slots) for example in examples)
    for laid in (prompt_batch.packed(examples, config), prompt_batch.one_per_row(examples, config)):
        batch = {name: array[0] for name, array in laid.batch.items()}
        M, visual, outside = len(batch["patches"]) // 4, 0, 0
        tokens, ids = batch["tokens"].ravel(), batch["segment_ids"].ravel()
        assert (ids > 0).sum() == sum(len(example.tokens) for example in examples)
        for number, example in enumerate(examples):
            m, s = len(example.patches) // 4, len(example.slots)
            for at in range(len(example.tokens)):
                place = laid.places[number, at]
                assert (tokens[place], ids[place]) == (example.tokens[at], number + 1)
                own, found = example.feature_index[at], batch["feature_index"].ravel()[place]
                if own < m:
                    assert found == (own + visual if own >= 0 else -1)
                else:
                    assert found == (M + own - m if own < m + s else M + S + outside + own - m - s)
                for name in ("feature_weights", "hidden", "late"):
                    mine = getattr(example, name)
                    assert name in batch or mine is None
                    assert name not in batch or batch[name].ravel()[place] == (0 if mine is None else mine[at])
            for name, mine in (("slot", example.slots), ("read", example.reads)):
                if len(mine):
                    kept = batch[f"{name}_index"][number, batch[f"{name}_mask"][number]]
                    np.testing.assert_array_equal(kept, laid.places[number, mine])
            patches = batch["patches"][4 * visual : 4 * (visual + m)]
            assert patches.tobytes() == example.patches.tobytes()
            assert batch["example_mask"][number] and batch["number"][number] == number
            visual, outside = visual + m, outside + prompt_batch.given_features(example, config)
        assert outside == sum(each.count for one in shown for each in given_slots(one))


def given_slots(shown):
    parts = (part for stretch in (shown["trunk"], *shown["views"]) for part in stretch)
    return [part for part in parts if isinstance(part, Slots) and part.source == "given"]
