"""Logits and gradients of random checkpoints against stock transformers, whole path against whole path, fp32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from latent_jax.data.packing import BatchShape, Packer
from latent_jax.data.prompt_batch import one_per_row
from latent_jax.models.qwen2_5_vl import hf_names
from tests.reference import ours
from tests.reference.checkpoints import SHAPES, saved
from tests.reference.conversations import CLIPS, STILLS, picture, user
from tests.reference.theirs import Processor, real


def their_logits(directory, model, conversations, **options) -> list[np.ndarray]:
    inputs = Processor.of(directory)(conversations, **options)
    with torch.no_grad():
        return real(inputs, model(**inputs).logits)


def assert_close(ours, theirs):
    """Within 1e-4 of the largest logit."""
    assert [each.shape for each in ours] == [each.shape for each in theirs]
    largest = max(np.abs(each).max() for each in theirs)
    worst = [np.abs(a - b).max() / largest for a, b in zip(ours, theirs, strict=True)]
    assert max(worst) < 1e-4, worst


@pytest.mark.parametrize("name", SHAPES)
def test_logits(name):
    """Text, one to three images, video, mixed in one batch; their batch padded on either side."""
    directory, model = saved(name)
    found = ours.logits(ours.load(directory), STILLS + CLIPS)
    for side in ("left", "right"):
        assert_close(found, their_logits(directory, model, STILLS + CLIPS, padding_side=side))


PAIRS = [("What colour is it?", "red"), ("How many cubes are there?", "three large ones"), ("Is it small?", "no")]


@pytest.mark.parametrize("name", ["as_published", "none_full_tied", "merge_four"])
def test_logits_of_packed_rows_and_of_views(name):
    """Several examples a row, images of all of them in one group, and questions that share an image as views."""
    directory, model = saved(name)
    loaded = ours.load(directory)
    image = {"type": "image", "image": picture(84, 112, 20)}
    views = loaded.processor.lay_out(loaded.processor.render_views([image], PAIRS))
    batch = pack(loaded, [*ours.examples(loaded, STILLS), views, *ours.examples(loaded, STILLS[1:2])])
    logits = np.asarray(ours.packed_logits(loaded.model, ours.on_device(batch), image_patches=128))[0]

    def of(slot, view=0):
        mine = batch["segment_ids"][0] == slot + 1
        return logits[mine & np.isin(batch["view_ids"][0], (0, view))]

    stills = their_logits(directory, model, STILLS)
    assert_close([of(slot) for slot in (*range(4), 5)], [*stills, stills[1]])
    alone = [[*user(image["image"], question), {"role": "assistant", "content": answer}] for question, answer in PAIRS]
    theirs = [their_logits(directory, model, [messages], add_generation_prompt=False)[0] for messages in alone]
    assert_close([of(4, view) for view in (1, 2, 3)], theirs)


def pack(loaded, examples) -> dict[str, np.ndarray]:
    """One group of two rows; the patch budget is no multiple of the largest image."""
    vision = loaded.config.vision
    tokens = sum(len(example.tokens) for example in examples) * 5 // 8
    packer = Packer(
        BatchShape(
            micro=1,
            groups=1,
            rows=2,
            tokens=tokens,
            patches=832,
            examples=8,
            slots=0,
            channels=3 * vision.patch_size**2,
            image_patches=128,
            merge_unit=vision.merge_unit,
        )
    )
    for example in examples:
        assert packer.add(example) is None
    batch = {key: value[0] for key, value in packer.flush().items()}
    assert batch["segment_ids"].max(axis=-1).all(), "a row is empty"
    return batch


@pytest.mark.parametrize("name", ["as_published", "none_full_tied"])
def test_gradients_of_every_parameter(name):
    directory, model = saved(name)
    loaded = ours.load(directory)
    conversations = [STILLS[0], STILLS[2], CLIPS[1]]
    inputs = Processor.of(directory)(conversations)
    weights = np.random.default_rng(0).uniform(0, 1, inputs["input_ids"].shape) * np.array(inputs["attention_mask"])
    weights[:, :-1] *= np.array(inputs["attention_mask"][:, 1:])
    weights[:, -1] = 0

    theirs = their_gradients(model, inputs, torch.tensor(weights))
    rows = one_per_row(ours.examples(loaded, conversations), loaded.config)
    T = rows.batch["tokens"].shape[2]
    padded = np.pad(weights, ((0, 0), (0, T - weights.shape[1]))).astype(np.float32)
    found = our_gradients(loaded, ours.on_device(rows.batch), rows.image_patches, jnp.asarray(padded))

    expected = {}
    for row in hf_names.weights(loaded.config):
        layers = [row.to_ours(theirs[published], loaded.config) for published in row.names(loaded.config)]
        expected[row.path] = np.stack(layers) if row.stacked else layers[0]
    assert found.keys() == expected.keys()
    largest = max(np.abs(each).max() for each in expected.values())
    for path, want in expected.items():
        scale = np.abs(want).max()
        assert scale > 0, path
        assert np.abs(np.asarray(found[path]) - want).max() < max(1e-3 * scale, 1e-6 * largest), path


def their_gradients(model, inputs, weights) -> dict[str, np.ndarray]:
    model.zero_grad()
    logp = torch.log_softmax(model(**inputs).logits[:, :-1], dim=-1)
    chosen = logp.gather(-1, inputs["input_ids"][:, 1:, None])[..., 0]
    (-chosen * weights[:, :-1]).sum().backward()
    gradients = {hf_names.normalise(name): p.grad.numpy().copy() for name, p in model.named_parameters()}
    model.zero_grad()
    return gradients


def our_gradients(loaded, batch, image_patches, weights) -> dict[str, jax.Array]:
    @functools.partial(jax.jit, compiler_options=ours.QUICK)
    @jax.grad
    def gradients(arrays):
        logp = jax.nn.log_softmax(ours.forward(loaded.structure.build(arrays), batch, image_patches)[0, :, :-1])
        chosen = jnp.take_along_axis(logp, batch["tokens"][0, :, 1:, None], axis=-1)[..., 0]
        return (-chosen * weights[:, :-1]).sum()

    return gradients(loaded.arrays)
