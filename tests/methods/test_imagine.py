"""Imagining after a question, packed, against every conversation alone in the two passes that inference makes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from latent_jax.data.layout import Text, with_learned_slots
from latent_jax.data.packing import BatchShape, Packer
from latent_jax.data.prompt_batch import one_per_row
from latent_jax.inference import decode
from latent_jax.methods import imagine, sft
from latent_jax.methods.latents import measure
from latent_jax.models.heads import LatentVLM
from latent_jax.models.parameters import Structure
from latent_jax.training.state import new_model
from tests.reference import latent, small
from tests.reference.ours import QUICK

COUNT = 3


def make_config(**sections):
    return small.config("imagine", latent=dict(grid=2), chat=dict(questions=2), **sections)


@functools.cache
def model() -> LatentVLM:
    config = make_config()
    make = lambda: new_model(config, imagine.METHOD, small.model_config())  # noqa: E731
    structure = Structure.of(nnx.eval_shape(make))
    arrays = jax.jit(lambda: structure.arrays(make()))()
    rng = np.random.default_rng(0)
    arrays["head.mean"] = jnp.asarray(rng.normal(size=64) * 0.1, jnp.float32)
    arrays["head.scale"] = jnp.asarray(rng.uniform(0.5, 2, size=64), jnp.float32)
    return structure.build(arrays)


@functools.cache
def packed():
    """Questions of three records and a caption, in two rows."""
    config, processor = make_config(), small.processor()
    size = dict(rows=2, tokens=256, patches=96, examples=4, slots=0, channels=588, image_patches=32)
    packer = Packer(BatchShape(micro=1, groups=1, **size).with_room(imagine.room(config)))
    records = [small.record(i) for i in range(COUNT)] + [small.record(COUNT) | {"questions": []}]
    for i, record in enumerate(records):
        assert packer.add(processor.lay_out(imagine.layout(record, i, config, processor))) is None
    return {key: jnp.asarray(value[0]) for key, value in packer.flush().items()}


@functools.partial(jax.jit, static_argnames="image_patches")
def hidden_states(vlm, batch, features, image_patches):
    return vlm.decode(decode.embed(vlm, batch, features, image_patches), batch)[0][0, 0]


def alone(content, answer) -> tuple[float, int]:
    """One conversation's cross-entropy and its tokens: slots first, and then what they predicted, given as inputs."""
    processor, vlm, head = small.processor(), model().vlm, model().head
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    shown = processor.render(messages)
    first = processor.lay_out(with_learned_slots(shown))
    features = jnp.zeros((1, 64))
    if len(first.slots):
        rows = one_per_row([first], vlm.config)
        features = head.unstandardise(
            head(hidden_states(vlm, rows.batch, head.slots[...], rows.image_patches)[first.slots])
        )
    example = processor.lay_out(shown)
    rows = one_per_row([example], vlm.config)
    hidden = hidden_states(vlm, rows.batch, features, rows.image_patches)
    spoken = example.loss_weights > 0
    logits = np.asarray(vlm.logits(hidden[: len(example.tokens)]))
    return latent.cross_entropy(logits[spoken], example.targets[spoken]), int(spoken.sum())


def image(record) -> dict:
    return {"type": "image", "image": record["images"][0]}


def test_packed_questions_equal_the_conversations_one_by_one():
    config = make_config()
    run = jax.jit(lambda model, batch: imagine.loss(model, batch, config), compiler_options=QUICK)
    terms, _ = run(model(), packed())
    total, count = 0.0, 0
    for i in range(COUNT):
        record = small.record(i)
        for question, answer in sft.pairs(record, i, config):
            part = {"type": "imagine", "grid": (2, 2)}
            loss, tokens = alone([image(record), {"type": "text", "text": question}, part], answer)
            total, count = total + loss, count + tokens
    record = small.record(COUNT)
    caption = sft.layout(record | {"questions": []}, COUNT, config, small.processor())
    text = "".join(part.text for part in caption.trunk if isinstance(part, Text) and part.loss)
    loss, tokens = alone(
        [image(record), {"type": "text", "text": "Describe the image."}], text.removesuffix("<|im_end|>")
    )
    np.testing.assert_allclose(terms["next_token"][0], total + loss, rtol=1e-4)
    assert (
        float(terms["next_token"][1]) == count + tokens == float(imagine.METHOD.weights(packed(), config)["next_token"])
    )


def test_the_answer_teaches_the_head_and_the_slots():
    config = make_config()
    structure = Structure.of(model())
    arrays = structure.arrays(model())

    def total(arrays):
        return imagine.loss(structure.build(arrays), packed(), config)[0]["next_token"][0]

    gradients = jax.jit(jax.grad(total), compiler_options=QUICK)(arrays)
    for path in ("head.slots", "head.fc1", "head.fc2", "vlm.text.blocks.q"):
        assert np.abs(gradients[path]).max() > 0, path


def test_a_trained_heads_statistics_stay_and_a_new_ones_are_measured():
    config, processor = make_config(), small.processor()
    assert imagine.fit(model(), iter(()), config) == {}
    fresh = LatentVLM(model().vlm, imagine.build_head(small.model_config(), config, nnx.Rngs(1)))
    size = dict(rows=1, tokens=64, patches=96, examples=4, slots=0, channels=588, image_patches=32)
    packer = Packer(BatchShape(micro=1, groups=1, **size).with_room(imagine.room(config)))
    for i in range(3):
        packer.add(processor.lay_out(imagine.fit_layout(small.record(i), i, config, processor)))
    batch = packer.flush()
    found = imagine.fit(fresh, [batch], config)
    want = measure(fresh, [batch], config.latent, config.data.image_patches)
    assert found.keys() == want.keys() == {"head.mean", "head.scale"}
    for name, value in want.items():
        np.testing.assert_array_equal(found[name], value)
