"""Latent pretraining: its terms on packed batches against torch and float64 formulas, one example at a time."""

import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import example, given, settings
from hypothesis import strategies as st

from latent_jax.config import schema
from latent_jax.data.layout import Layout, Text
from latent_jax.data.packing import BatchShape, Packer
from latent_jax.errors import UserError
from latent_jax.inference import prompts
from latent_jax.methods import pretrain
from latent_jax.methods.latents import READOUTS, Latent, imagined_grid, merge_latents
from latent_jax.models.parameters import Structure
from latent_jax.training.state import new_model
from tests.reference import latent, ours
from tests.reference.checkpoints import saved
from tests.reference.conversations import picture
from tests.reference.theirs import Processor

SIDE = 2
CAPTIONS = [
    "a large red ball",
    "a small blue cube left of a green cone",
    "three stars",
    "a red ball.",
    "one cone above it",
    "a striped yellow cube",
    "a purple star and a cyan ball",
    "small green things",
]
# In pixels, for patches of 8: merged grids of 3 x 5, 4 x 4, 2 x 6 ..., which a 2 x 2 grid does and does not divide.
SIZES = [(48, 80), (64, 64), (32, 96), (80, 48), (48, 48), (64, 80), (48, 64), (80, 80)]


def make_config(**sections):
    config = schema.default("pretrain")
    config.model.remat = "none"
    config.data.replay, config.data.image_patches, config.latent.grid = 0.25, 128, SIDE
    for name, values in sections.items():
        config[name].update(values)
    return schema.resolve(config)


def records() -> list[dict]:
    def png(image):
        buffer = io.BytesIO()
        image.save(buffer, "png")
        return buffer.getvalue()

    return [
        {"key": f"r{i}", "images": [png(picture(*size, seed=i))], "captions": [caption], "questions": []}
        for i, (size, caption) in enumerate(zip(SIZES, CAPTIONS, strict=True))
    ]


@functools.cache
def made(config):
    """(checkpoint, torch model, structure, arrays): the checkpoint with a head that is random in every parameter."""
    directory, model = saved("small_patches")
    loaded = ours.load(directory)
    structure = Structure.of(nnx.eval_shape(lambda: new_model(config, pretrain.METHOD, loaded.config)))
    rng = np.random.default_rng(5)
    arrays = {f"vlm.{path}": array for path, array in loaded.arrays.items()}
    for path in structure.variables:
        if path.startswith("head."):
            value = rng.normal(0, 1 if path == "head.slots" else 0.3, structure.shape(path)) + (path == "head.norm")
            arrays[path] = jnp.asarray(np.abs(value) + 0.5 if path == "head.scale" else value, jnp.float32)
    return loaded, model, structure, arrays


def packed(config, layout=pretrain.layout) -> tuple[dict, np.ndarray]:
    """The eight records in two groups of two rows, with room to spare; and which example stands in which slot."""
    loaded = made(config)[0]
    packer = Packer(
        BatchShape(
            micro=1,
            groups=2,
            rows=2,
            tokens=112,
            patches=576,
            examples=5,
            channels=192,
            slots=0,
            image_patches=128,
        ).with_room(pretrain.room(config))
    )
    for i, record in enumerate(records()):
        assert packer.add(loaded.processor.lay_out(layout(record, i, config, loaded.processor))) is None
    batch = packer.flush()
    assert batch["example_mask"].sum(axis=-1).all(), "a group is empty"
    return {key: jnp.asarray(value[0]) for key, value in batch.items()}, np.where(
        batch["example_mask"], batch["number"], -1
    )[0]


# ---------------------------------------------------------------- the reference


def caption_states(config, caption: str) -> tuple[np.ndarray, np.ndarray, float, int]:
    """By torch: hidden states (S, D) that the head reads, and the caption's cross-entropy and number of tokens."""
    loaded, model, _, arrays = made(config)
    slots = np.asarray(arrays["head.slots"], np.float64)
    by_slots = config.latent.readout == "slots"
    tail = "<|vision_start|>" + "<|image_pad|>" * SIDE**2 + "<|vision_end|>" if by_slots else "<|im_end|>"
    tokenizer = loaded.processor.tokenizer
    ids = torch.tensor([tokenizer(f"<|im_start|>{caption}{tail}")["input_ids"]])
    count = len(tokenizer(caption)["input_ids"])
    pads = ids == loaded.config.image_token_id
    x = model.get_input_embeddings()(ids).detach()
    if by_slots:
        x[pads] = torch.tensor(slots, dtype=torch.float32)
    unit = loaded.config.vision.spatial_merge_size
    grid = torch.tensor([[1, SIDE * unit, SIDE * unit]]) if by_slots else None
    positions, _ = model.model.get_rope_index(ids, pads.int(), grid)
    with torch.no_grad():
        hidden = model.model.language_model(inputs_embeds=x, position_ids=positions).last_hidden_state
        loss = latent.cross_entropy(model.lm_head(hidden)[0, :count].numpy(), ids[0, 1 : count + 1].numpy())
    hidden = hidden[0].double().numpy()
    if by_slots:
        return hidden[pads[0].numpy()], loss, count
    text = hidden[count] if config.latent.readout == "last_token" else hidden[1 : count + 1].mean(0)
    return text + slots, loss, count


def replay_loss(config, record) -> tuple[float, int]:
    """By torch: cross-entropy of the caption and its end of turn, after the image and the request for it."""
    loaded, model, _, _ = made(config)
    content = [{"type": "image", "image": picture_of(record)}, {"type": "text", "text": "Describe the image."}]
    caption = record["captions"][0]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": caption}]
    inputs = Processor.of(saved("small_patches")[0])([turns], add_generation_prompt=False)
    start = Processor.of(saved("small_patches")[0])([turns[:1]])["input_ids"].shape[1]
    count = len(loaded.processor.tokenizer(caption)["input_ids"]) + 1
    with torch.no_grad():
        logits = model(**inputs).logits[0, start - 1 : start - 1 + count].numpy()
    return latent.cross_entropy(logits, inputs["input_ids"][0, start : start + count].numpy()), count


def head_weights(arrays) -> dict[str, np.ndarray]:
    """The head's parameters and statistics in float64."""
    return {
        path.removeprefix("head."): np.asarray(array, np.float64)
        for path, array in arrays.items()
        if path.startswith("head.")
    }


def picture_of(record):
    return picture(*SIZES[int(record["key"][1:])], seed=int(record["key"][1:]))


def target_latents(config, record) -> np.ndarray:
    _, model, _, _ = made(config)
    inputs = Processor.of(saved("small_patches")[0])(
        [[{"role": "user", "content": [{"type": "image", "image": picture_of(record)}]}]]
    )
    return latent.image_latents(model, inputs, config.latent.space, SIDE)


def is_replay(i: int) -> bool:
    return i % 4 == 3


# ---------------------------------------------------------------- the terms


VARIANTS = {
    "slots": dict(latent=dict(readout="slots", space="merged"), loss=dict(similarity="l2", alignment="infonce")),
    "last_token": dict(
        latent=dict(readout="last_token", space="encoder"),
        loss=dict(similarity="cosine", norm_weighted=True, norm_term=0.5, alignment="sigmoid"),
    ),
    "mean_text": dict(
        latent=dict(readout="mean_text", space="merged"),
        loss=dict(similarity="smooth_l1", smooth_l1_beta=0.7, alignment="relational"),
    ),
    "slots_encoder": dict(
        latent=dict(readout="slots", space="encoder"),
        loss=dict(similarity="contrastive", alignment="infonce"),
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_terms_of_a_packed_batch_equal_the_examples_one_by_one(variant):
    config = make_config(**VARIANTS[variant])
    _, _, structure, arrays = made(config)
    batch, _ = packed(config)
    run = jax.jit(
        lambda arrays, batch: pretrain.loss(structure.build(arrays), batch, config), compiler_options=ours.QUICK
    )
    terms, metrics = run(arrays, batch)

    weights = head_weights(arrays)
    predicted, target, spoken, tokens = [], [], 0.0, 0
    for i, record in enumerate(records()):
        if is_replay(i):
            loss, count = replay_loss(config, record)
        else:
            hidden, loss, count = caption_states(config, record["captions"][0])
            predicted.append(latent.head(weights, hidden))
            target.append((target_latents(config, record) - weights["mean"]) / weights["scale"])
        spoken, tokens = spoken + loss, tokens + count
    p, z = np.stack(predicted), np.stack(target)
    expected = {
        "next_token": (spoken, tokens),
        "similarity": (latent.similarity(config.loss.similarity, p, z, config.loss), p.shape[0] * p.shape[1]),
        "alignment": (
            latent.alignment(
                config.loss.alignment, p.mean(1), z.mean(1), weights["logit_scale"], weights["logit_bias"]
            ),
            len(p),
        ),
    }
    assert terms.keys() == expected.keys() == pretrain.coefficients(config, jnp.float32(0.5)).keys()
    for name, (total, weight) in expected.items():
        np.testing.assert_allclose(terms[name][0], total, rtol=3e-4, err_msg=name)
        assert float(terms[name][1]) == weight, name
        assert float(pretrain.weights(batch, config)[name]) == weight, name
    cosines = [latent.cosine(a, b) for a, b in zip(p.reshape(-1, p.shape[-1]), z.reshape(-1, p.shape[-1]), strict=True)]
    np.testing.assert_allclose(metrics["similarity/cosine"][0], sum(cosines), rtol=1e-3, atol=1e-3)
    assert metrics["next_token/accuracy"][1] == tokens


def test_what_is_imagined_after_training_is_what_training_predicted():
    """The facade's `imagine` on captions alone, in the encoder's own space."""
    for variant in ("slots", "mean_text"):
        config = make_config(**VARIANTS[variant], data=dict(replay=0.0))
        loaded, _, structure, arrays = made(config)
        weights = head_weights(arrays)
        said = [[{"role": "user", "content": [{"type": "imagine", "text": each}]}] for each in CAPTIONS[:3]]
        found = prompts.think([structure.build(arrays)], loaded.processor, config, said)
        for caption, ((latents, _),) in zip(CAPTIONS, found, strict=False):
            want = latent.head(weights, caption_states(config, caption)[0]) * weights["scale"] + weights["mean"]
            np.testing.assert_allclose(latents, want, atol=1e-4 * np.abs(want).max())


def test_gradients_do_not_reach_the_encoder_through_the_targets():
    config = make_config(loss=dict(similarity="l2", alignment="infonce"))
    _, _, structure, arrays = made(config)
    batch, _ = packed(config)

    @functools.partial(jax.jit, compiler_options=ours.QUICK)
    @jax.grad
    def gradients(arrays):
        terms, _ = pretrain.loss(structure.build(arrays), batch, config)
        return terms["similarity"][0] + terms["alignment"][0]

    for path, gradient in gradients(arrays).items():
        trained = not path.startswith("vlm.vision.") and structure.trained(path)
        reached = trained and path not in ("head.logit_bias", "vlm.text.lm_head")
        if path not in ("head.mean", "head.scale"):  # they are frozen, and only standardise the target
            assert bool(np.abs(gradient).max() > 0) == reached, path


@pytest.mark.parametrize("scale", ["rms", "std"])
def test_fit_measures_mean_and_scale_of_the_targets(scale):
    config = make_config(latent=dict(space="encoder", scale=scale))
    _, _, structure, arrays = made(config)
    batch, _ = packed(config, pretrain.fit_layout)
    found = pretrain.fit(structure.build(arrays), [{key: value[None] for key, value in batch.items()}], config)
    z = np.concatenate([target_latents(config, record) for record in records()])
    deviation = z.std(0) if scale == "std" else np.full(z.shape[1], np.sqrt(z.var(0).mean()))
    np.testing.assert_allclose(found["head.mean"], z.mean(0), atol=1e-4)
    np.testing.assert_allclose(found["head.scale"], deviation, rtol=1e-3)


def test_pre_merger_latents_go_through_the_merger_as_an_images_patches_do():
    """The true patches of a square image in place of imagined ones give its merged tokens."""
    loaded, model = ours.load(saved("small_patches")[0]), saved("small_patches")[1]
    image = [{"role": "user", "content": [{"type": "image", "image": picture(32, 32, 9)}]}]
    inputs = Processor.of(saved("small_patches")[0])([image])
    before = latent.image_latents(model, inputs, "encoder", side=4)
    merged = latent.image_latents(model, inputs, "merged", side=2)
    found = merge_latents(loaded.model, jnp.asarray(before[None], jnp.float32), side=4)
    np.testing.assert_allclose(found[0], merged, atol=1e-4 * np.abs(merged).max())


# ---------------------------------------------------------------- the host half


class Chat:
    """Stands for a processor: all that the host half asks of one is to render a conversation."""

    def render(self, messages, key):
        return Layout(trunk=(Text(messages[-1]["content"], loss=True),), key=key)


def shown(i, config, captions=("a", "b", "c")) -> Layout:
    record = {"key": f"r{i}", "images": [b"x"], "captions": list(captions), "questions": []}
    return pretrain.layout(record, i, config, Chat())


@settings(max_examples=100, deadline=None)
@example((22, 15), 0)
@given(st.integers(1, 256).flatmap(lambda size: st.tuples(st.just(size), st.integers(0, size))), st.integers(0, 10**6))
def test_every_batch_holds_the_replay_share_exactly(case, number):
    size, replayed = case
    config = make_config(data=dict(replay=replayed / size), latent=dict(captions="first"))
    layouts = [shown(i, config) for i in range(number * size, (number + 1) * size)]
    assert sum(not layout.targets for layout in layouts) == replayed


def test_captions_are_drawn_by_seed_and_index_and_all_of_them_come_up():
    def drawn(seed, **options):
        config = make_config(data=dict(replay=0.5), latent=options)
        return [next(p.text for p in shown(i, config).trunk if isinstance(p, Text) and p.loss) for i in range(60)]

    assert drawn(0) == drawn(0)
    assert set(drawn(0)) == {"a", "b", "c"}
    assert set(drawn(0, captions="first")) == {"a"}


def test_a_record_without_a_caption_says_so():
    for draw in ("first", "random"):
        config = make_config(latent=dict(captions=draw))
        with pytest.raises(UserError, match="record 'r7': has no caption; expected image-caption pairs"):
            shown(7, config, captions=())


def test_no_image_stands_in_the_sequence_that_imagines_it():
    for readout in READOUTS:
        config = make_config(data=dict(replay=0.0), latent=dict(readout=readout))
        layout = shown(1, config)
        assert layout.targets == (0,)
        loaded = ours.load(saved("small_patches")[0])
        example = loaded.processor.lay_out(pretrain.layout(records()[0], 0, config, loaded.processor))
        merged = len(example.patches) // 4
        assert merged == 15
        assert not ((example.feature_index >= 0) & (example.feature_index < merged)).any()
        room = pretrain.room(config)
        assert (len(example.slots), len(example.reads)) == (room.slots, room.reads)


def test_imagined_grid():
    assert imagined_grid(Latent(grid=3)) == (3, 3)
    assert imagined_grid(Latent(grid=4, space="encoder")) == (2, 2)
    with pytest.raises(UserError, match=r"latent.grid 3"):
        imagined_grid(Latent(grid=3, space="encoder"))


def test_coefficients_follow_their_schedules():
    config = make_config(
        loss=dict(
            next_token_weight=2.0,
            similarity_weight=0.5,
            alignment_weight=0.0,
            similarity_schedule=((0.0, 0.0), (0.5, 1.0)),
        )
    )
    found = {fraction: pretrain.coefficients(config, jnp.float32(fraction)) for fraction in (0.0, 0.25, 0.5, 1.0)}
    assert [float(each["similarity"]) for each in found.values()] == [0.0, 0.25, 0.5, 0.5]
    assert {float(each["next_token"]) for each in found.values()} == {2.0}
    assert {float(each["alignment"]) for each in found.values()} == {0.0}
