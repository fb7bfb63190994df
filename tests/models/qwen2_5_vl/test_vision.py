"""The vision tower alone against transformers': every block, several images, padding, video frames."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from latent_jax.data.layout import Image, Layout, Video
from latent_jax.data.prompt_batch import one_per_row
from latent_jax.models.qwen2_5_vl.rope import axial
from latent_jax.models.qwen2_5_vl.vision import VisionTower
from tests.reference import ours
from tests.reference.checkpoints import saved
from tests.reference.conversations import picture, user
from tests.reference.theirs import Processor

PICTURES = (picture(84, 168, 40), picture(140, 56, 41), picture(56, 56, 42))


@functools.partial(jax.jit, static_argnames="image_patches", compiler_options=ours.QUICK)
def encode(model, batch, image_patches):
    return model.encode(batch, image_patches=image_patches, collect=True)


def rows(loaded, images, part=Image):
    example = loaded.processor.lay_out(Layout(tuple(images), trunk=tuple(part(i) for i in range(len(images)))))
    return example, one_per_row([example], loaded.config)


@pytest.mark.parametrize("name", ["as_published", "none_full_tied", "wide_window"])
def test_every_block_and_the_merger_equal_transformers(name):
    directory, model = saved(name)
    loaded = ours.load(directory)
    example, made = rows(loaded, PICTURES)
    merged, before, blocks = encode(loaded.model, ours.on_device(made.batch), made.image_patches)
    inputs = Processor.of(directory)([user(*PICTURES)])
    theirs = []
    hooks = [block.register_forward_hook(lambda _, __, out: theirs.append(out)) for block in model.model.visual.blocks]
    with torch.no_grad():
        out = model.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
    for hook in hooks:
        hook.remove()
    patches = len(example.patches)
    assert blocks.shape[0] == len(theirs)
    for found, want in zip(np.asarray(blocks)[:, 0, :patches], theirs, strict=True):  # window order on both sides
        np.testing.assert_allclose(found, want, atol=1e-4 * want.abs().max())
    np.testing.assert_array_equal(np.asarray(before), np.asarray(blocks)[-1])
    order = example.feature_index[example.feature_index >= 0]
    want = out.pooler_output
    np.testing.assert_allclose(np.asarray(merged)[0][order], want, atol=1e-4 * want.abs().max())


def test_images_do_not_see_each_other_nor_padding():
    loaded = ours.load(saved("as_published")[0])
    example, made = rows(loaded, PICTURES)
    batch = {key: np.array(value) for key, value in made.batch.items()}
    for key in ("patches", "patch_positions", "patch_window", "patch_image"):  # room for more than there is
        batch[key] = np.pad(batch[key], [(0, 0), (0, 16)] + [(0, 0)] * (batch[key].ndim - 2))

    def run(batch):
        return np.asarray(encode(loaded.model, ours.on_device(batch), made.image_patches)[0])[0]

    want = run(batch)
    second = batch["patch_image"][0] == 2
    padding = batch["patch_image"][0] == 0
    assert padding.sum() >= 16
    batch["patches"][0, second | padding] = np.random.default_rng(0).integers(0, 255, batch["patches"].shape[-1])
    found, changed = run(batch), second.reshape(-1, 4).any(1)
    untouched = ~changed & ~padding.reshape(-1, 4).any(1)
    np.testing.assert_array_equal(found[untouched], want[untouched])
    assert (np.abs(found[changed] - want[changed]).max(axis=1) > 1e-3).all()


def test_a_still_equals_a_clip_of_two_equal_frames():
    """The summed temporal kernel is the two kernels on a frame shown twice."""
    loaded = ours.load(saved("as_published")[0])
    still, made = rows(loaded, PICTURES[:1])
    clip, made_clip = rows(loaded, [[PICTURES[0]] * 2], Video)
    assert clip.patches.shape[1] == 2 * still.patches.shape[1]
    found = [encode(loaded.model, ours.on_device(each.batch), each.image_patches)[0] for each in (made, made_clip)]
    np.testing.assert_allclose(*found, atol=1e-5 * float(jnp.abs(found[0]).max()))


def test_slices_of_a_clip_do_not_see_each_other():
    """As in transformers, full attention stays within one temporal slice."""
    loaded = ours.load(saved("all_full")[0])
    frames = [picture(84, 112, seed) for seed in range(4)]
    outs = []
    for last in (frames[3], picture(84, 112, 9)):
        _, made = rows(loaded, [[*frames[:3], last]], Video)
        outs.append(np.asarray(encode(loaded.model, ours.on_device(made.batch), made.image_patches)[0])[0])
    merged = 6 * 8 // 4
    np.testing.assert_array_equal(outs[0][:merged], outs[1][:merged])
    assert (np.abs(outs[0] - outs[1])[merged : 2 * merged].max(axis=1) > 1e-3).all()


@pytest.mark.parametrize("full", [(), (0, 1, 2, 3, 4, 5), (2, 5), (1, 3, 5), (1, 2)], ids=str)
def test_any_pattern_of_layers_in_any_loop_equals_layer_after_layer(full):
    loaded = ours.load(saved("as_published")[0])
    config = dataclasses.replace(loaded.model.config.vision, depth=6, fullatt_block_indexes=full)
    tower, made = VisionTower(config, nnx.Rngs(0), jnp.float32), rows(loaded, PICTURES)[1]
    names = ("patches", "patch_positions", "patch_window", "patch_image")
    patches, positions, window, image = (jnp.asarray(made.batch[name]) for name in names)
    mean, std = loaded.model.config.image_mean, loaded.model.config.image_std
    x, outputs = tower.embed(patches, mean, std), []
    for layer in range(6):
        block = jax.tree.map(lambda weight: weight[layer], tower.blocks)  # noqa: B023
        group = (image, made.image_patches) if layer in full else (window, config.window_patches)
        x = block(x, axial(positions, config.head_size), *group, "reference")
        outputs.append(x)
    for unroll in (1, 2, 3, 8):
        found = tower(
            patches, positions, window, image, image_patches=made.image_patches, mean=mean, std=std, unroll=unroll,
            collect=True,
        )  # fmt: skip
        np.testing.assert_allclose(found[2], jnp.stack(outputs), rtol=1e-5, atol=1e-5 * np.abs(x).max())


def test_rematerialising_changes_no_gradient():
    loaded = ours.load(saved("none_full_tied")[0])
    batch = ours.on_device(rows(loaded, PICTURES[2:])[1].batch)
    values = {path: array for path, array in loaded.arrays.items() if path.startswith("vision.")}

    @functools.partial(jax.jit, static_argnums=1, compiler_options=ours.QUICK)
    def gradient(values, remat):
        def loss(values):
            model = loaded.structure.build({**loaded.arrays, **values})
            return (model.encode(batch, image_patches=16, remat=remat)[0] ** 2).sum()

        return jax.grad(loss)(values)

    plain, remade = gradient(values, "none"), gradient(values, "full")
    for path in plain:
        np.testing.assert_allclose(remade[path], plain[path], rtol=1e-4, atol=1e-4 * np.abs(plain[path]).max())
