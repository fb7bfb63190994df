"""Packing against its slow inverse."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_jax.data.layout import Example, Layout, Room
from latent_jax.data.packing import BatchShape, Packer, Size, batches, given_features, shapes, size_of
from latent_jax.errors import UserError
from tests.data import tiny_processor
from tests.reference import layouts

UNIT, CHANNELS = 4, 3 * 4
BATCH_SHAPE = BatchShape(
    micro=2,
    groups=2,
    rows=2,
    tokens=16,
    patches=24,
    examples=3,
    slots=4,
    channels=CHANNELS,
    image_patches=16,
    merge_unit=UNIT,
    targets=2,
    reads=2,
    regress=True,
    hidden=True,
)


def make_example(number, tokens, images, slots, views, target):
    """A valid example of random content: `images` is the merged tokens of each image."""
    rng = np.random.default_rng(number)
    merged = sum(images)
    features = np.full(tokens, -1, np.int32)
    places = rng.permutation(tokens)
    features[places[: min(merged, tokens - slots)]] = np.arange(min(merged, tokens - slots))
    slot_tokens = np.sort(places[tokens - slots :]).astype(np.int32)
    features[slot_tokens] = merged + np.arange(slots)
    return Example(
        tokens=rng.integers(1, 99, tokens).astype(np.int32),
        view_ids=np.sort(rng.integers(0, views + 1, tokens)).astype(np.int32),
        positions=rng.integers(0, 99, (3, tokens)).astype(np.int32),
        targets=rng.integers(1, 99, tokens).astype(np.int32),
        loss_weights=rng.random(tokens).astype(np.float32),
        feature_index=features,
        patches=rng.integers(0, 256, (merged * UNIT, CHANNELS)).astype(np.uint8),
        patch_positions=rng.integers(0, 9, (merged * UNIT, 2)).astype(np.int32),
        patch_window=np.repeat(np.arange(1, merged + 1, dtype=np.int32), UNIT),
        patch_image=np.repeat(np.arange(1, len(images) + 1, dtype=np.int32), np.array(images, int) * UNIT),
        slots=slot_tokens,
        reads=rng.integers(0, tokens, number % 3).astype(np.int32),
        target_image=rng.permutation(len(images))[: 2 * target].astype(np.int32) + 1,
        target_grid=rng.integers(1, 9, (min(len(images), 2 * target), 2)).astype(np.int32),
        feature_weights=rng.random(tokens).astype(np.float32) if number % 2 else None,
        hidden=rng.random(tokens) < 0.5 if number % 2 else None,
        late=rng.random(tokens) < 0.5 if number % 2 else None,
        key=f"r{number}",
    )


@st.composite
def example_lists(draw):
    def one(number):
        images = draw(st.lists(st.integers(1, 3), max_size=2))
        tokens = draw(st.integers(5, 16))
        return make_example(
            number,
            tokens,
            images,
            draw(st.integers(0, 4)),
            draw(st.integers(0, 2)),
            draw(st.booleans()) and bool(images),
        )

    return [one(number) for number in range(draw(st.integers(1, 20)))]


def unpack(batch, originals):
    """{number: Example} of one batch, every field read back from the batch.

    A batch does not say how many patches an example has: the originals' lengths tell where the next one starts.
    """
    found, starts = {}, {}
    for a, g, place in zip(*np.nonzero(batch["example_mask"]), strict=True):
        group = {name: array[a, g] for name, array in batch.items()}
        number = group["number"][place]
        original = originals[number]
        rows, where = np.nonzero(group["segment_ids"] == place + 1)
        row = rows[0]
        assert (rows == row).all() and (np.diff(where) == 1).all()
        patch, window, image = starts.get((a, g), (0, 0, 0))
        count = len(original.patches)
        here = slice(patch, patch + count)
        flat = row * BATCH_SHAPE.tokens + where[0]
        features = [unpacked_feature(value, patch, count) for value in group["feature_index"][row, where]]
        per_token = ("tokens", "view_ids", "targets", "loss_weights")
        asked = {name: group[name][row, where] for name in ("feature_weights", "hidden", "late")}
        empty = [name for name in asked if getattr(original, name) is None]
        assert not any(asked[name].any() for name in empty)
        targets = group["target_mask"][place]
        found[number] = Example(
            **{name: group[name][row, where] for name in per_token},
            **{name: None if name in empty else values for name, values in asked.items()},
            positions=group["positions"][row][:, where],
            feature_index=np.array(features, np.int32),
            patches=group["patches"][here],
            patch_positions=group["patch_positions"][here],
            patch_window=group["patch_window"][here] - window,
            patch_image=group["patch_image"][here] - image,
            slots=(group["slot_index"][place, group["slot_mask"][place]] - flat).astype(np.int32),
            reads=(group["read_index"][place, group["read_mask"][place]] - flat).astype(np.int32),
            target_image=group["target_image"][place, targets] - image,
            target_grid=group["target_grid"][place, targets],
            key=original.key,
        )
        starts[a, g] = (
            patch + count,
            window + original.patch_window.max(initial=0),
            image + original.patch_image.max(initial=0),
        )
    return found, starts


def unpacked_feature(value, patch, count):
    merged = BATCH_SHAPE.patches // UNIT
    if value < 0:
        return -1
    return value - patch // UNIT if value < merged else value - merged + count // UNIT


@given(example_lists())
@settings(max_examples=40, deadline=None)
def test_unpacking_gives_every_example_back(examples):
    seen = 0
    for batch in batches(examples, BATCH_SHAPE):
        check_shapes(batch)
        found, ends = unpack(batch, examples)
        assert sorted(found) == list(range(seen, seen + len(found))), "in data order, none lost, none twice"
        for number, example in found.items():
            for field in dataclasses.fields(Example):
                again, original = getattr(example, field.name), getattr(examples[number], field.name)
                np.testing.assert_array_equal(again, original, field.name)
        check_padding(batch, ends)
        check_indices(batch)
        seen += len(found)
    assert seen == len(examples)


def check_shapes(batch):
    A, G, B, T, P, E, S, c = dataclasses.astuple(BATCH_SHAPE)[:8]
    wide = {
        "positions": (B, 3, T),
        "patches": (P, c),
        "patch_positions": (P, 2),
        "patch_window": (P,),
        "patch_image": (P,),
        **dict.fromkeys(("example_mask", "number"), (E,)),
        **dict.fromkeys(("slot_index", "slot_mask"), (E, S)),
        **dict.fromkeys(("target_image", "target_mask", "read_index", "read_mask"), (E, 2)),
        "target_grid": (E, 2, 2),
    }
    assert batch.keys() == shapes(BATCH_SHAPE).keys()
    for name, array in batch.items():
        assert array.shape == (A, G, *wide.get(name, (B, T))), name
        kind = {"loss_weights": "float32", "feature_weights": "float32", "patches": "uint8"}
        assert array.dtype == ("bool" if name.endswith(("_mask", "hidden", "late")) else kind.get(name, "int32")), name


def check_padding(batch, ends):
    empty = batch["segment_ids"] == 0
    for name in ("tokens", "view_ids", "targets", "loss_weights", "feature_weights", "hidden", "late"):
        assert not batch[name][empty].any()
    assert (batch["feature_index"][empty] == -1).all()
    for a, g in np.ndindex(BATCH_SHAPE.micro, BATCH_SHAPE.groups):
        used = ends.get((a, g), (0, 0, 0))[0]
        assert (batch["patch_image"][a, g, :used] > 0).all() and not batch["patch_image"][a, g, used:].any()
        assert (np.diff(batch["patch_image"][a, g, :used]) >= 0).all(), "an image's patches are contiguous"
        assert (np.diff(batch["patch_window"][a, g, :used]) >= 0).all()


def check_indices(batch):
    first_slot = BATCH_SHAPE.patches // UNIT
    assert batch["feature_index"].max() < first_slot + BATCH_SHAPE.slots
    assert batch["slot_index"].max() < BATCH_SHAPE.rows * BATCH_SHAPE.tokens
    for a, g in np.ndindex(*batch["segment_ids"].shape[:2]):
        found = set(batch["segment_ids"][a, g].ravel().tolist()) - {0}
        assert found == set((np.flatnonzero(batch["example_mask"][a, g]) + 1).tolist())
    for a, g, row in np.ndindex(*batch["segment_ids"].shape[:3]):
        segments = batch["segment_ids"][a, g, row]
        assert (np.diff(segments[segments > 0]) >= 0).all()
        features = batch["feature_index"][a, g, row]
        visual = features[(features >= 0) & (features < first_slot)]
        assert (batch["patch_image"][a, g, visual * UNIT] > 0).all()


def test_the_first_example_that_fits_nowhere_opens_the_next_step():
    """Against the plain statement of first fit: a smaller one that comes later does not slip in before it."""
    batch_shape = dataclasses.replace(BATCH_SHAPE, micro=1, groups=1, rows=1, examples=9)
    lengths = [10, 5, 3, 1, 16, 2]
    examples = [make_example(number, length, [], 0, 0, False) for number, length in enumerate(lengths)]
    packer = Packer(batch_shape)
    steps = [batch for example in examples if (batch := packer.add(example))] + [packer.flush()]
    assert [batch["number"][batch["example_mask"]].tolist() for batch in steps] == [[0, 1], [2, 3], [4], [5]]
    assert packer.flush() is None


def test_the_example_budget_binds_a_group():
    batch_shape = dataclasses.replace(BATCH_SHAPE, micro=1, groups=2, tokens=64, examples=2)
    found = list(batches([make_example(i, 5, [], 0, 0, False) for i in range(5)], batch_shape))
    assert [batch["number"][batch["example_mask"]].tolist() for batch in found] == [[0, 1, 2, 3], [4]]
    assert found[0]["number"].tolist() == [[[0, 1], [2, 3]]]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens": 17}, "17 tokens, more than the budget of 16"),
        ({"images": [3, 4]}, "28 patches, more than the budget of 24"),
        ({"images": [5]}, "20 patches in one image, more than the budget of 16"),
        ({"slots": 5}, "5 slots, more than the budget of 4"),
    ],
)
def test_an_example_over_budget_is_named_and_not_taken(change, words):
    values = {"tokens": 8, "images": [1], "slots": 0, "views": 0, "target": False, **change}
    packer = Packer(BATCH_SHAPE)
    with pytest.raises(UserError, match=f"'r7': {words}"):
        packer.add(make_example(7, **values))
    assert packer.flush() is None


def test_stills_join_video_batches_as_repeated_frames():
    still = make_example(0, 5, [2], 0, 0, False)
    batch = next(batches([still], dataclasses.replace(BATCH_SHAPE, channels=2 * CHANNELS)))
    wide = batch["patches"][0, 0, :8].reshape(8, 3, 2, 4)
    for frame in range(2):
        np.testing.assert_array_equal(wide[:, :, frame], still.patches.reshape(8, 3, 4))
    clip = dataclasses.replace(still, patches=wide.reshape(8, -1))
    with pytest.raises(UserError, match="video"):
        Packer(BATCH_SHAPE).add(clip)


def test_given_latents_stand_in_their_examples_slot():
    """Those that bring none have zeros; one whose image would have to be encoded is refused."""
    batch_shape = dataclasses.replace(BATCH_SHAPE, targets=1, target_slots=2, target_size=3, target_dtype="bfloat16")
    rng = np.random.default_rng(0)
    given = {number: rng.normal(size=(2, 3)).astype(ml_dtypes.bfloat16) for number in range(7) if number % 3}
    examples = [
        dataclasses.replace(make_example(number, 5, [1], 2, 0, False), target_latents=given.get(number))
        for number in range(7)
    ]
    for batch in batches(examples, batch_shape):
        assert batch["target_latents"].shape == (2, 2, 3, 2, 3)
        assert batch["target_latents"].dtype == ml_dtypes.bfloat16
        for place in np.ndindex(batch["number"].shape):
            latents = given.get(batch["number"][place]) if batch["example_mask"][place] else None
            assert batch["target_mask"][place] == (latents is not None)
            assert np.array_equal(batch["target_latents"][place], np.zeros((2, 3)) if latents is None else latents)
    with pytest.raises(UserError, match="'r8': its image has no latents in the latent cache"):
        Packer(batch_shape).add(make_example(8, 5, [1], 2, 0, True))
    with pytest.raises(ValueError, match="'r0': latents float32"):
        Packer(batch_shape).add(dataclasses.replace(examples[0], target_latents=np.zeros((2, 3), np.float32)))


def test_budgets_that_cannot_be_are_refused():
    with pytest.raises(UserError, match="merge_unit"):
        dataclasses.replace(BATCH_SHAPE, patches=25)
    with pytest.raises(UserError, match="at least 1"):
        dataclasses.replace(BATCH_SHAPE, rows=0)


def test_size_says_what_an_example_needs_room_for():
    assert size_of(make_example(0, 12, [2, 1], 3, 0, True)) == Size(12, 12, 3, CHANNELS, 8, 2)
    assert size_of(make_example(2, 12, [2], 3, 0, True)) == Size(12, 8, 3, CHANNELS, 8, 1, 2)
    assert size_of(make_example(1, 12, [], 0, 0, False)) == Size(12, 0, 0, CHANNELS, 0, 0, 1, True, True)
    assert size_of(make_example(1, 12, [], 0, 0, False)).room == Room(0, 0, 1, True, True)


def test_what_a_method_made_no_room_for_is_its_fault_and_no_records():
    example = make_example(1, 12, [2], 0, 0, False)
    for name in ("regress", "hidden"):
        with pytest.raises(ValueError, match=rf"'r1': needs Room\({name}=True\)"):
            Packer(dataclasses.replace(BATCH_SHAPE, **{name: False})).add(example)
    features = example.feature_index.copy()
    features[:2] = 2 + np.arange(2)
    outside = dataclasses.replace(example, feature_index=features)
    assert given_features(outside) == 2
    with pytest.raises(ValueError, match="'r1': 2 given features, which only prompts have"):
        Packer(BATCH_SHAPE).add(outside)


def test_there_is_no_array_for_what_has_no_room():
    plain = BatchShape(micro=1, groups=1, rows=1, tokens=8, patches=0, examples=1, slots=0, channels=1)
    always = shapes(plain).keys()
    more = {
        "slots": ({"slot_index", "slot_mask"}, 1),
        "targets": ({"target_image", "target_grid", "target_mask"}, 1),
        "reads": ({"read_index", "read_mask"}, 1),
        "regress": ({"feature_weights"}, True),
        "hidden": ({"hidden", "late"}, True),
    }
    for name, (arrays, size) in more.items():
        assert shapes(plain.with_room(Room(**{name: size}))).keys() - always == arrays


# ---------------------------------------------------------------- laid-out layouts of every part


def seen(group, place):
    """What one example is in its group, position by position, told without the places of its neighbours."""
    merged = len(group["patches"]) // UNIT
    rows, tokens = np.nonzero(group["segment_ids"] == place + 1)
    flat = {row * group["tokens"].shape[1] + token: at for at, (row, token) in enumerate(zip(rows, tokens))}

    def patches(of):
        return [(group["patches"][p].tobytes(), group["patch_positions"][p].tolist()) for p in of]

    def feature(index):
        if index < 0:
            return None
        if index < merged:
            return "patches", patches(range(index * UNIT, (index + 1) * UNIT))
        return "slot", int(index - merged)

    found = []
    for row, token in zip(rows, tokens):
        names = ("tokens", "view_ids", "targets", "loss_weights", "feature_weights", "hidden", "late")
        found.append([group[name][row, token].item() for name in names])
        found[-1] += [group["positions"][row, :, token].tolist(), feature(group["feature_index"][row, token])]
    for name in ("slot", "read"):
        found.append([flat[i] for i in group[f"{name}_index"][place, group[f"{name}_mask"][place]]])
    for image, grid, there in zip(*(group[f"target_{name}"][place] for name in ("image", "grid", "mask"))):
        found.append((grid.tolist(), patches(np.flatnonzero(group["patch_image"] == image))) if there else None)
    return found


@given(st.lists(layouts.layouts(), min_size=1, max_size=6))
@settings(max_examples=25, deadline=None)
def test_packed_equals_one_by_one_for_every_part(processor, shown):
    examples = [processor.lay_out(Layout(**each)) for each in shown]
    size = dict(rows=2, tokens=160, patches=160, examples=3, channels=588)
    batch_shape = BatchShape(micro=2, groups=1, slots=0, **size).with_room(Room(40, 2, 20, True, True))
    alone = dataclasses.replace(batch_shape, micro=1, rows=1, examples=1, patches=120)
    count = 0
    for batch in batches(examples, batch_shape):
        for a, g, place in zip(*np.nonzero(batch["example_mask"]), strict=True):
            number = batch["number"][a, g, place]
            (single,) = batches([examples[number]], alone)
            mine = seen({name: array[a, g] for name, array in batch.items()}, place)
            assert mine == seen({name: array[0, 0] for name, array in single.items()}, 0)
            count += 1
    assert count == len(examples)


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return tiny_processor.processor(tmp_path_factory.mktemp("tiny"))
