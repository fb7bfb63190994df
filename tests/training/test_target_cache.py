"""A latent cache for a method of several targets an example: what is kept, and what training sees of it."""

import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from latent_jax.config import schema
from latent_jax.data import latent_cache, packing, pipeline
from latent_jax.data.chat import Processor
from latent_jax.data.layout import Layout, Room, Text
from latent_jax.errors import UserError
from latent_jax.losses.pooling import adaptive_pool
from latent_jax.methods import pretrain
from latent_jax.methods.contract import CachedTargets
from latent_jax.models import hf_io
from latent_jax.models.parameters import Structure
from latent_jax.models.qwen2_5_vl.config import from_json
from latent_jax.models.qwen2_5_vl.model import encode
from latent_jax.models.qwen2_5_vl.vision import VisionTower
from latent_jax.runtime import sharding
from latent_jax.training import shapes, target_cache
from tests.reference.checkpoints import saved

SIDE, MOST = 2, 3  # of the grid of a target's latents; targets of an example
COUNTS = (2, 1, 3, 0, 2, 3, 4, 1)  # images of each record; one has none, one more than there is room for
BROKEN = 4


# ---------------------------------------------------------------- a method of up to three targets


def layout(record, index, config, processor):
    """Three words, and behind them the record's images as targets: from pixels, or from their latents."""
    given, helpers = record.get("latents"), tuple(record["helpers"])
    if given is not None:
        return Layout((), (Text("one two three", loss=True),), key=record["key"], latents=given)
    return Layout(helpers, (Text("one two three", loss=True),), targets=tuple(range(len(helpers))), key=record["key"])


def encoded(vision, model_config, batch, config):
    merged, _, _ = encode(vision, model_config, batch, image_patches=config.data.image_patches)
    unit = model_config.vision.spatial_merge_size
    image, cells = batch["patch_image"][:, :: unit**2], batch["patch_positions"][:, :: unit**2] // unit
    pool = jax.vmap(lambda *given: adaptive_pool(*given, side=SIDE))
    one = [
        pool(merged, image, cells, batch["target_image"][..., j], batch["target_grid"][:, :, j]) for j in range(MOST)
    ]
    return jnp.concatenate(one, axis=2)


METHOD = dataclasses.replace(
    pretrain.METHOD,
    layout=layout,
    room=lambda config: Room(targets=MOST),
    targets=CachedTargets(
        images=lambda record: record["helpers"],
        made_from=lambda config: {"side": SIDE},
        shape=lambda model_config, config: (MOST * SIDE**2, model_config.text.hidden_size),
        layout=lambda record, config: layout({**record, "latents": None}, 0, config, None),
        encode=encoded,
    ),
)


class Helpers(Sequence):
    def __init__(self):
        rng, self.helpers = np.random.default_rng(0), []
        for count in COUNTS:
            self.helpers.append([png(rng) for _ in range(count)])
        self.helpers[BROKEN][1] = b"no image"

    def __len__(self):
        return len(self.helpers)

    def __getitem__(self, index):
        return {"key": f"r{index}", "images": [], "helpers": self.helpers[index]}


def png(rng):
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (*rng.integers(30, 90, 2), 3), np.uint8)).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture
def made(tmp_path):
    origin = saved("as_published")[0]
    config = schema.default("pretrain")
    config.model.update(path=str(origin))
    config.data.update(latent_cache=str(tmp_path / "cache"), name="helpers", path=str(tmp_path), sample=4)
    config.train.batch_size = 8
    processor = Processor.from_directory(origin)
    model_config = dataclasses.replace(
        from_json(Path(origin) / "config.json"), image_mean=processor.image.mean, image_std=processor.image.std
    )
    mesh = sharding.make_mesh(1, 1, 1, jax.devices()[:1])
    return target_cache.TargetCache(schema.resolve(config), METHOD, processor, model_config, Path(origin), mesh)


def batches(made, data):
    """Two rows of a training batch's targets: (key, mask, latents or None) of every example."""
    layout_of = shapes.layout_of(METHOD, made.config, made.processor)
    batch_shape, _ = shapes._choose_budgets(made.config, METHOD, made.processor, made.model_config, [(data, 1.0)], 1)
    iterator = pipeline.make_dataset(
        data, layout_fn=layout_of, processor=made.processor, batch_shape=batch_shape.with_room(METHOD.room(None)),
        shuffle=False, epochs=1, max_broken=1.0,
    )  # fmt: skip
    return list(iterator), iterator.get_state()


def test_training_sees_the_latents_of_every_target_of_every_record(made, monkeypatch):
    monkeypatch.setattr(latent_cache, "_SHARD_RECORDS", 3)
    source = Helpers()
    [(cached, _)] = made.attach([(source, 1.0)], lambda line: None)
    kept = [len(record.get("latents", ())) // SIDE**2 for record in cached]
    assert kept == [2, 1, 3, 0, 0, 3, 0, 1], "none of the broken one, and none of the one with too many"
    (from_cache,), state = batches(made, cached)
    (from_pixels,), other = batches(made, source)
    assert state["seen"] == other["seen"] == len(COUNTS)
    # Without an image there is nothing to predict: the record itself is as good as any.
    numbers = [0, 1, 2, 3, 5, 7]
    for batch in (from_cache, from_pixels):
        assert batch["number"][batch["example_mask"]].tolist() == numbers
        assert batch["target_mask"][batch["example_mask"]].sum(-1).tolist() == [2, 1, 3, 0, 3, 1]
    assert not from_cache["patches"].any() and from_pixels["patches"].any()
    batch = {name: jnp.asarray(array[0]) for name, array in from_pixels.items()}
    batch_shape = from_pixels["patches"].shape[2]
    config = dataclasses.replace(made.config, data=dataclasses.replace(made.config.data, image_patches=batch_shape))
    want = whole(made, batch, config).reshape(*batch["target_mask"].shape, SIDE**2, -1)
    got = from_cache["target_latents"][0].reshape(want.shape)
    mask = from_cache["target_mask"][0]
    np.testing.assert_allclose(got[mask], want[mask], atol=1e-5 * np.abs(want).max())
    assert not got[~mask].any()


def whole(made, batch, config):
    """The targets of a training batch, by the vision tower of the checkpoint."""

    structure = Structure.of(nnx.eval_shape(lambda: VisionTower(made.model_config.vision, nnx.Rngs(0), jnp.float32)))
    places = {f"vision.{path}": sharding.replicated(made.mesh) for path in structure.variables}
    found = hf_io.load(made.origin, made.model_config, shardings=places, prefix="vision.")
    arrays = {path.removeprefix("vision."): array.astype(jnp.float32) for path, array in found.items()}
    return np.asarray(encoded(structure.build(arrays), made.model_config, batch, config))


def test_a_record_with_another_second_image_is_refused(made):
    source = Helpers()
    made.attach([(source, 1.0)], lambda line: None)
    source.helpers[0][1] = png(np.random.default_rng(9))
    [(cached, _)] = made.attach([(source, 1.0)], lambda line: None)
    assert "latents" in cached[1]
    with pytest.raises(UserError, match="record 0 has another image than when this latent cache was made"):
        cached[0]


def test_records_that_the_method_cannot_read_are_skipped_and_counted(made):
    class Odd(Helpers):
        def __getitem__(self, index):
            record = super().__getitem__(index)
            return record if index != 1 else {name: value for name, value in record.items() if name != "helpers"}

    [(cached, _)] = made.attach([(Odd(), 1.0)], lambda line: None)
    _, state = batches(made, cached)
    assert "latents" in cached[0] and "record 'r1': KeyError: 'helpers'" in state["broken"][0]


def test_a_method_without_room_for_targets_has_nothing_to_cache(made):
    without = dataclasses.replace(made, method=dataclasses.replace(METHOD, room=lambda config: Room()))
    with pytest.raises(UserError, match="config.data.latent_cache: .* has no latent targets to keep"):
        without.attach([(Helpers(), 1.0)], lambda line: None)


def test_latents_of_half_a_target_are_the_methods_fault(made):
    batch_shape = packing.BatchShape(
        micro=1, groups=1, rows=1, tokens=32, patches=0, examples=1, slots=0, channels=588, targets=MOST,
        target_slots=MOST * SIDE**2, target_size=4,
    )  # fmt: skip
    for count, fits in ((4, True), (8, True), (12, True), (0, False), (6, False), (16, False)):
        example = made.processor.lay_out(Layout((), (Text("one", loss=True),), latents=np.ones((count, 4), np.float32)))
        if not fits:
            with pytest.raises(ValueError, match="batches hold"):
                packing.Packer(batch_shape).add(example)
            continue
        (batch,) = packing.batches([example], batch_shape)
        assert batch["target_mask"][0, 0, 0].tolist() == [count >= 4 * (j + 1) for j in range(MOST)]
        assert batch["target_latents"].sum() == count * 4
