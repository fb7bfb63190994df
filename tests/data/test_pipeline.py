"""The iterator of batches: order, epochs, mixtures, processes, resume at any step, broken records."""

import dataclasses
import gc
import io
import itertools
import json
import threading
import time

import numpy as np
import PIL.Image
import pytest

from latent_jax.data import batch_shapes, image_readers, packing, pipeline
from latent_jax.data.layout import Image, Layout, Text
from latent_jax.data.packing import BatchShape
from latent_jax.errors import UserError
from tests.data import tiny_processor

BATCH_SHAPE = BatchShape(
    micro=1, groups=2, rows=1, tokens=96, patches=64, examples=3, slots=0, channels=588, image_patches=16
)


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return tiny_processor.processor(tmp_path_factory.mktemp("tiny"))


def png(seed):
    buffer = io.BytesIO()
    size = 28 * (1 + seed % 2), 56
    PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3)).astype(np.uint8)).save(buffer, "png")
    return buffer.getvalue()


def records(count, prefix="r"):
    return [
        {"key": f"{prefix}{i}", "images": [png(i)], "captions": [f"{prefix} {i} " + "ball " * (i % 5)]}
        for i in range(count)
    ]


def layout(record, index):
    """Shows the sample's place and key, and dawdles so that threads finish out of order."""
    time.sleep(0.002 * (index % 3))
    return Layout(tuple(record["images"]), (Image(0), Text(f"#{index}:{record['key']}#", True)), key=record["key"])


def make(source, processor, **options):
    defaults = {"layout_fn": layout, "processor": processor, "batch_shape": BATCH_SHAPE, "seed": 3}
    return pipeline.make_dataset(source, **{**defaults, **options})


def shown(batch, processor):
    """(place in the global order, record key) of every example, in slot order."""
    found = []
    for *group, slot in zip(*np.nonzero(batch["example_mask"]), strict=True):
        tokens, segments = (batch[name][tuple(group)] for name in ("tokens", "segment_ids"))
        text = processor.tokenizer.decode(tokens[segments == slot + 1], skip_special_tokens=True)
        index, key = text.strip("#").split(":")
        assert batch["number"][*group, slot] == int(index), "the place that its layout was asked for"
        found.append((int(index), key))
    return found


def equal(first, second):
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], name)


def order(iterator, processor, count=None):
    return [item for batch in itertools.islice(iterator, count) for item in shown(batch, processor)]


def test_one_epoch_in_order_gives_every_record_once(processor):
    found = order(make(records(20), processor, shuffle=False, epochs=1), processor)
    assert sorted(found) == [(i, f"r{i}") for i in range(20)]


def test_batches_do_not_depend_on_threads_or_prefetch(processor):
    runs = [
        list(make(records(17), processor, epochs=2, threads=threads, prefetch=prefetch))
        for threads, prefetch in ((0, 1), (1, 3), (5, 2))
    ]
    for batches in zip(*runs, strict=True):
        equal(batches[0], batches[1])
        equal(batches[0], batches[2])


def test_every_epoch_is_a_new_order_of_all_records(processor):
    found = sorted(order(make(records(15), processor, epochs=3), processor))
    epochs = [[key for _, key in found[start : start + 15]] for start in (0, 15, 30)]
    assert [index for index, _ in found] == list(range(45))
    assert all(sorted(epoch) == sorted(f"r{i}" for i in range(15)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3
    other = sorted(order(make(records(15), processor, epochs=1, seed=4), processor))
    assert [key for _, key in other] != epochs[0]


@pytest.mark.parametrize("options", [{"epochs": 2}, {"epochs": None, "threads": 1}, {"epochs": 2, "shuffle": False}])
def test_resumes_to_the_bit_at_every_step(processor, options):
    source = records(13)
    source[4]["images"] = [b"broken"]
    iterator = make(source, processor, **options)
    states, expected, skipped = [iterator.get_state()], [], []
    for batch in itertools.islice(iterator, 6):
        expected.append(batch)
        states.append(json.loads(json.dumps(iterator.get_state())))
        skipped.append(iterator.skipped)
    iterator.close()
    assert skipped[-1] >= 1
    for step, state in enumerate(states):
        again = make(source, processor, **options)
        again.set_state(state)
        assert again.get_state() == states[step]
        for position in range(step, len(expected)):
            equal(next(again), expected[position])
            assert again.skipped == skipped[position] and again.get_state() == states[position + 1]
        again.close()


def test_an_iterator_can_be_set_back_and_closed_midway(processor):
    iterator = make(records(13), processor, epochs=None)
    first = next(iterator)
    state = iterator.get_state()
    second, _ = next(iterator), next(iterator)
    iterator.set_state(state)
    equal(next(iterator), second)
    iterator.set_state(make(records(13), processor).get_state())
    equal(next(iterator), first)
    iterator.close()
    equal(next(iterator), second)
    with pytest.raises(UserError, match="next_index"):
        iterator.set_state({"next_index": 3})


def test_a_finished_iterator_resumes_as_finished(processor):
    iterator = make(records(5), processor, epochs=1)
    assert len(list(iterator)) == 1 and next(iterator, None) is None
    again = make(records(5), processor, epochs=1)
    again.set_state(iterator.get_state())
    assert next(again, None) is None


def test_mixture_follows_its_weights(processor):
    mixture = [(records(40, "a"), 3.0), (records(40, "b"), 1.0)]
    found = sorted(order(make(mixture, processor, epochs=None), processor, 8))[:40]
    assert [index for index, _ in found] == list(range(40)), "places count over the mixture"
    assert sum(key.startswith("a") for _, key in found) == 30
    assert len({key for _, key in found}) == 40


def test_hosts_build_their_groups_of_one_global_batch(processor):
    """Whatever hosts there are: their batches side by side are those of one host, and so is where their data stands."""
    source = records(30)
    source[3]["images"] = [png(3)[:60]]  # whole to its header, found broken by the host that decodes it
    source[8]["images"] = [b"broken"]
    batch_shape = dataclasses.replace(BATCH_SHAPE, groups=4, micro=2, examples=2)
    alone = make(source, processor, batch_shape=batch_shape, epochs=2, max_broken=0.1)
    hosts = [
        [make(source, processor, batch_shape=batch_shape, epochs=2, max_broken=0.1, own=own) for own in split]
        for split in ([(0, 1), (2, 3)], [(0, 2), (1, 3)], [(0,), (1,), (2,), (3,)])
    ]
    owners = [[0, 1, 2, 3], [0, 2, 1, 3], [0, 1, 2, 3]]
    seen = 0
    for whole in alone:
        seen += whole["example_mask"].sum()
        for iterators, order in zip(hosts, owners, strict=True):
            parts = [next(iterator) for iterator in iterators]
            side_by_side = {name: np.concatenate([part[name] for part in parts], axis=1) for name in whole}
            equal({name: side_by_side[name][:, np.argsort(order)] for name in whole}, whole)
            states = [iterator.get_state() for iterator in iterators]
            assert sum(state.pop("blank") for state in states) == alone.get_state()["blank"]
            for state in states:
                assert {**state, "broken": 0} == {k: v for k, v in alone.get_state().items() if k != "blank"} | {
                    "broken": 0
                }
    assert seen == 2 * 28 and alone.skipped == 4 and alone.get_state()["blank"] == 2
    assert all(next(iterator, None) is None for iterators in hosts for iterator in iterators)


def test_a_run_goes_on_with_another_number_of_hosts(processor):
    batch_shape = dataclasses.replace(BATCH_SHAPE, groups=4, examples=1)
    alone = make(records(24), processor, batch_shape=batch_shape)
    hosts = [make(records(24), processor, batch_shape=batch_shape, own=own) for own in ((0, 1), (2, 3))]
    for _ in range(3):
        next(alone), [next(host) for host in hosts]
    again = make(records(24), processor, batch_shape=batch_shape)
    again.set_state(json.loads(json.dumps(hosts[1].get_state())))
    equal(next(again), next(alone))


def test_another_hosts_images_are_not_decoded(processor, monkeypatch):
    decoded = []
    decode = image_readers.ImageDecoder.still
    monkeypatch.setattr(image_readers.ImageDecoder, "still", lambda *given: decoded.append(given[2]) or decode(*given))
    source = [{**record, "key": f"here {record['key']}"} for record in records(24)]
    host = make(source, processor, own=(1,), epochs=1)
    used = sum(batch["example_mask"].sum() for batch in host)
    decoded = [name for name in decoded if "here" in name]  # threads of other tests' iterators may still be at work
    assert used == len(decoded) == len(set(decoded))
    assert 0 < len(decoded) < 24


def test_broken_and_oversized_records_are_skipped_and_counted(processor):
    source = records(12)
    source[2]["images"] = [png(2)[:60]]
    source[7]["key"] = "long " * 60
    iterator = make(source, processor, shuffle=False, epochs=1)
    keys = {key for _, key in order(iterator, processor)}
    assert keys == {f"r{i}" for i in range(12)} - {"r2", "r7"}
    assert iterator.skipped == 2
    messages = iterator.get_state()["broken"]
    assert "r2" in messages[0] and "budget of 96" in messages[1]


def test_too_many_broken_records_are_an_error_that_names_the_first(processor):
    source = records(10)
    source[5]["images"] = [b"broken"]
    iterator = make(source, processor, shuffle=False, epochs=None)  # a tenth, above the twentieth that is let pass
    seen = 0
    with pytest.raises(UserError, match=r"11 of 106 records are broken, more than 5%: record 'r5'") as caught:
        for batch in iterator:
            seen += batch["example_mask"].sum()
    assert str(caught.value).count("'r5'") == 1 and seen > 70, "not before a hundred were seen"
    allowed = make(source, processor, shuffle=False, epochs=15, max_broken=0.15)
    assert sum(batch["example_mask"].sum() for batch in allowed) == 135 and allowed.skipped == 15


def test_nothing_but_broken_records_is_an_error(processor):
    source = [{"key": "k", "images": [b""], "captions": ["x"]}]
    with pytest.raises(UserError, match="no usable record.*'k'"):
        list(make(source, processor, epochs=1))
    with pytest.raises(UserError, match="empty"):
        make([], processor)
    with pytest.raises(UserError, match="positive"):
        make([(records(2), 1.0), (records(2), 0.0)], processor)


def test_a_programming_error_meets_every_record_and_ends_the_run_with_its_place(processor):
    def fails(record, index):
        raise KeyError("captoins")

    with pytest.raises(UserError, match=r"no usable record: .*KeyError: 'captoins' \(test_pipeline.py:\d+\)"):
        next(make(records(3), processor, layout_fn=fails, epochs=1))


@pytest.mark.parametrize(
    "problem", [AttributeError("'int' object has no attribute 'x'"), ValueError("bad\nheader"), OSError("cut")]
)
def test_whatever_a_record_raises_it_is_skipped_and_counted_with_its_key(processor, problem):
    def fails(record, index):
        if record["key"] == "r1":
            raise problem
        return layout(record, index)

    iterator = make(records(9), processor, layout_fn=fails, epochs=1)
    list(iterator)
    assert iterator.skipped == 1
    (told,) = iterator.get_state()["broken"]
    assert told.startswith(f"record 'r1': {type(problem).__name__}: {' '.join(str(problem).split())} (")


def test_no_thread_outlives_its_iterator(processor):
    before = {*threading.enumerate()}
    for end in (lambda iterator: iterator.close(), lambda iterator: None, lambda iterator: [*iterator]):
        iterator = make(records(9), processor, epochs=2, own=(0,), threads=2)
        next(iterator)
        end(iterator)
        del iterator
    gc.collect()
    for thread in {*threading.enumerate()} - before:
        thread.join(10)
        assert not thread.is_alive(), thread


@pytest.mark.parametrize("broken", [SystemExit("panic"), KeyboardInterrupt()])
def test_what_is_no_exception_reaches_the_caller_and_hangs_nobody(processor, broken):
    def fails(record, index):
        raise broken

    with pytest.raises(RuntimeError, match=type(broken).__name__):
        next(make(records(9), processor, layout_fn=fails))


def test_an_error_is_raised_again_where_batches_are_asked_for_again(processor):
    iterator = make([{"key": "k", "images": [b""], "captions": ["x"]}], processor, epochs=1)
    for _ in range(3):
        with pytest.raises(UserError, match="no usable record.*'k'"):
            next(iterator)


def test_sampled_examples_choose_budgets_that_hold_the_data(processor):
    source = records(30)
    source[0]["images"] = [b"broken"]
    sample = pipeline.sample_examples(source, layout, processor, 10)
    assert len(sample) == 9 and all(example.patches.shape[1] == 588 for example in sample)
    assert [example.key for example in sample] == [f"r{i}" for i in range(3, 30, 3)]
    batch_shape = batch_shapes.choose(sample, batch_size=8, groups=2, window_patches=16)
    iterator = make(source, processor, batch_shape=batch_shape, epochs=1)
    assert sum(batch["example_mask"].sum() for batch in iterator) == 29 and iterator.skipped == 1
    with pytest.raises(UserError, match="no usable record.*'r0'"):
        pipeline.sample_examples(source, layout, processor, 1)


def noise(batch, processor) -> dict[str, list[float]]:
    """{key and place: what a sampled method draws for it}, from a key an example folded with its number."""
    found = {}
    numbers = batch["number"][batch["example_mask"]].tolist()
    for (index, key), number in zip(shown(batch, processor), numbers, strict=True):
        found[f"{index} {key}"] = np.random.default_rng((5, number)).normal(size=2).tolist()
    return found


@pytest.mark.parametrize(
    "shape",
    [
        {"groups": 1, "rows": 2, "examples": 6},
        {"groups": 1, "micro": 2},
        {"micro": 2, "tokens": 128},
        {"groups": 4, "examples": 2, "patches": 96},
    ],
)
def test_an_examples_noise_depends_on_nothing_but_its_place_in_the_data_order(processor, shape):
    """Not on packing, micro-steps, hosts, threads, prefetching, resumes or broken neighbours."""
    source = records(17)
    source[4]["images"] = [b"broken"]
    source[6]["images"] = [png(6)[:60]]
    options = dict(epochs=2, max_broken=0.2)
    want = {}
    for batch in make(source, processor, **options):
        want |= noise(batch, processor)
    assert len(want) == 30 and len({tuple(drawn) for drawn in want.values()}) == 30
    batch_shape = dataclasses.replace(BATCH_SHAPE, **shape)
    found, iterator = {}, make(source, processor, batch_shape=batch_shape, threads=1, prefetch=1, **options)
    for batch in iterator:
        found |= noise(batch, processor)
        state, again = iterator.get_state(), make(source, processor, batch_shape=batch_shape, prefetch=3, **options)
        again.set_state(json.loads(json.dumps(state)))
        iterator.close()
        iterator = again
        if len(found) > 20:
            break
    hosts = [
        make(source, processor, batch_shape=batch_shape, own=(own,), **options) for own in range(batch_shape.groups)
    ]
    for host in hosts:
        host.set_state({**iterator.get_state(), "blank": 0})
        for batch in host:
            found |= noise(batch, processor)
    assert found == want


def test_examples_whose_latents_come_from_a_cache_have_the_numbers_of_those_with_images(processor):
    def cached(record, index):
        shown = layout(record, index)
        return Layout((), shown.trunk[1:], key=record["key"], latents=np.full((2, 3), index, np.float32))

    options = dict(epochs=2, seed=7)
    want, found = {}, {}
    for batch in make(records(15), processor, **options):
        want |= noise(batch, processor)
    batch_shape = dataclasses.replace(BATCH_SHAPE, patches=0, image_patches=0, targets=1, target_slots=2, target_size=3)
    for batch in make(records(15), processor, layout_fn=cached, batch_shape=batch_shape, **options):
        found |= noise(batch, processor)
        numbers = batch["number"][batch["example_mask"]]
        assert np.array_equal(batch["target_latents"][batch["example_mask"]][:, 0, 0], numbers)
        assert np.array_equal(batch["target_mask"][..., 0], batch["example_mask"])
    assert found == want


def test_evaluation_batches_hold_every_example_once_in_order(processor):
    examples = [processor.lay_out(layout(record, i)) for i, record in enumerate(records(8))]
    found = [item for batch in packing.batches(examples, BATCH_SHAPE) for item in shown(batch, processor)]
    assert sorted(found) == [(i, f"r{i}") for i in range(8)]
