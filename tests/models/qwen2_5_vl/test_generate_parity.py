"""Greedy generation through the facade, token for token against `generate` of stock transformers."""

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import latent_jax
from latent_jax.data.layout import Image, Layout, Slots, Text
from latent_jax.data.prompt_batch import one_per_row
from latent_jax.inference import decode
from tests.reference import ours, theirs
from tests.reference.checkpoints import edit_json, saved
from tests.reference.conversations import CLIPS, STILLS, picture

NEW = 24
# Texts of several lengths, one image, two images; and a clip whose time runs past the text's positions.
MIXED = [STILLS[0], STILLS[1], STILLS[2], CLIPS[2], CLIPS[0]]


def expected(directory, model, conversations, eos, **options):
    inputs = theirs.Processor.of(directory)(conversations, padding_side="left", **options)
    return theirs.generate(model, inputs, NEW, eos, pad=0)


@pytest.mark.parametrize("name", ["as_published", "first_full_tied"])
def test_batch_equals_single_equals_transformers(name):
    directory, model = saved(name)
    vlm = latent_jax.load(directory)
    batch = vlm.generate_ids(MIXED, NEW)
    assert batch == expected(directory, model, MIXED, vlm.eos)
    assert batch == [expected(directory, model, [messages], vlm.eos)[0] for messages in MIXED]
    for i in (0, 2) if name == "as_published" else ():
        assert vlm.generate_ids([MIXED[i]], NEW) == [batch[i]]
    assert len({tuple(row) for row in batch}) == len(batch), "the rows do not depend on their prompts"
    decode = vlm.processor.tokenizer.decode
    assert vlm.generate(MIXED, NEW) == [decode(row, skip_special_tokens=True) for row in batch]


def test_rows_stop_at_any_end_token_and_the_others_go_on(tmp_path):
    directory, model = saved("as_published")
    free = latent_jax.load(directory).generate_ids(MIXED, NEW)
    # Ends that free generation says early in one row and later or never in others.
    eos = (free[0][2], free[2][5])
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    edit_json(tmp_path / "generation_config.json", eos_token_id=list(eos))
    found = latent_jax.load(tmp_path).generate_ids(MIXED, NEW)
    assert found == expected(directory, model, MIXED, eos)
    assert len({len(row) for row in found}) > 1


def test_logits_of_the_facade_are_those_of_transformers():
    directory, model = saved("as_published")
    found = latent_jax.load(directory).logits(STILLS[2])
    inputs = theirs.Processor.of(directory)([STILLS[2]])
    want = model(**inputs).logits[0].detach().numpy()
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, want, atol=1e-4 * np.abs(want).max())


def test_encode_image_is_transformers_image_features():
    directory, model = saved("as_published")
    image = picture(84, 168, 30)
    inputs = theirs.Processor.of(directory)([[{"role": "user", "content": [{"type": "image", "image": image}]}]])
    want = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output[0].detach().numpy()
    np.testing.assert_allclose(latent_jax.load(directory).encode_image(image), want, atol=1e-4 * np.abs(want).max())


def test_true_visual_tokens_as_imagined_features_equal_the_image():
    """In a batch of three rows: the image, its own tokens as features in its place, and those in the wrong order."""
    loaded = ours.load(saved("as_published")[0])
    images = (picture(84, 112, 31), picture(56, 84, 32))
    before, after = Text("<|im_start|>user\nLook: "), Text(" and say what it is.")
    seen = loaded.processor.lay_out(Layout(images, trunk=(before, Image(0), after, Image(1), after)))
    given = Slots((3, 4), source="given")
    imagined = loaded.processor.lay_out(Layout(images, trunk=(before, given, after, Image(1), after)))
    np.testing.assert_array_equal(seen.positions, imagined.positions)
    np.testing.assert_array_equal(seen.tokens, imagined.tokens)
    rows = one_per_row([seen, imagined, imagined], loaded.config)

    @functools.partial(jax.jit, compiler_options=ours.QUICK)
    def logits(model, batch, given):
        x = decode.embed(model, batch, given, rows.image_patches)
        return model.logits(model.decode(x, batch)[0])[0]

    tokens = latent_jax.load(saved("as_published")[0]).encode_image(images[0])
    found = logits(loaded.model, ours.on_device(rows.batch), jnp.concatenate([tokens, tokens[::-1]]))
    want, same, wrong = np.asarray(found)[:, : rows.lengths[0]]
    np.testing.assert_allclose(same, want, atol=1e-5 * np.abs(want).max())
    assert np.abs(wrong - want).max() > 1e-2 * np.abs(want).max(), "the features do not matter"
