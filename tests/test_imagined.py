"""What imagine parts stand for: the same for a conversation alone and in a batch, and what interventions put there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from latent_jax import generate, imagined
from latent_jax.data import rows
from latent_jax.data.layout import Layout, Slots
from latent_jax.errors import UserError
from latent_jax.methods import imagine, pretrain
from latent_jax.models.weights import Structure
from latent_jax.state import new_model
from latent_jax.vlm import VLM
from tests.reference import small

GRID = 2


@functools.cache
def facade() -> VLM:
    config = small.config("imagine", latent=dict(grid=GRID))
    make = lambda: new_model(config, imagine, small.model_config())  # noqa: E731
    structure = Structure.of(nnx.eval_shape(make))
    arrays = jax.jit(lambda: structure.arrays(make()))()
    rng = np.random.default_rng(0)
    arrays["head.mean"] = jnp.asarray(rng.normal(size=64), jnp.float32)
    arrays["head.scale"] = jnp.full(64, 0.5, jnp.float32)
    return VLM(structure.build(arrays), small.codec(), pretrain.Latent(grid=GRID), (574,), "small")


def picture(index: int) -> dict:
    return {"type": "image", "image": small.record(index)["images"][0]}


def user(*content) -> list[dict]:
    return [{"role": "user", "content": [{"type": "text", "text": c} if isinstance(c, str) else c for c in content]}]


SILENT = {"type": "imagine"}
CONVERSATIONS = [
    user(picture(0), "What color is it?", SILENT),
    user("Is there a ball?"),
    user({"type": "imagine", "text": "a red ball"}, "and", {"type": "imagine", "text": "a blue cube"}, "alike?"),
    user(picture(1), "And here, what is to be seen at all?", SILENT, "Say it."),
]


@jax.jit
def hidden_states(model, batch, given):
    return model.vlm.decode(generate.embed(model.vlm, batch, given, 32), batch)[0][0, 0]


def in_context(messages) -> np.ndarray:
    """Latents of the one silent part, from a sequence of its own that ends with the slots."""
    vlm = facade()
    shown = vlm.codec.render(messages, imagined_grid=(GRID, GRID))
    end = next(i for i, part in enumerate(shown.trunk) if isinstance(part, Slots))
    example = vlm.codec.lay_out(Layout(shown.images, (*shown.trunk[:end], Slots((GRID, GRID)))))
    laid = rows.one_per_row([example], vlm.config)
    hidden = hidden_states(vlm.model, laid.batch, vlm.model.head.slots[...])
    return np.asarray(vlm.model.head.restore(vlm.model.head(hidden[example.slots])))


def test_a_batch_of_all_kinds_has_each_ones_own_latents():
    found = facade().prompts(CONVERSATIONS).latents
    expected = [
        in_context(CONVERSATIONS[0]),
        facade().imagine("a red ball"),
        facade().imagine("a blue cube"),
        in_context(CONVERSATIONS[3]),
    ]
    np.testing.assert_allclose(found, np.stack(expected), rtol=1e-4, atol=1e-5)
    assert np.abs(expected[0] - expected[3]).max() > 0.01  # the context matters


def test_answers_in_a_batch_are_those_alone():
    together = facade().generate_ids(CONVERSATIONS, max_new_tokens=4)
    assert together == [facade().generate_ids([messages], max_new_tokens=4)[0] for messages in CONVERSATIONS]


def test_interventions_replace_what_was_predicted():
    vlm = facade()
    own = vlm.prompts(CONVERSATIONS)
    given = {mode: vlm.prompts(CONVERSATIONS, mode, seed=3).given for mode in imagined.LATENTS if mode != "none"}
    D = own.given.shape[-1]
    assert np.array_equal(given["own"], own.latents.reshape(-1, D))
    assert not np.any(given["zero"]) and given["zero"].shape == own.given.shape
    mean = vlm.model.head.mean[...]
    assert np.array_equal(given["mean"], np.broadcast_to(mean, own.given.shape))
    assert np.array_equal(given["shuffled"], np.roll(own.latents, 2, axis=0).reshape(-1, D))
    standard = (np.asarray(given["noise"]) - mean) / 0.5
    assert abs(standard.mean()) < 0.2 and abs(standard.std() - 1) < 0.1
    assert not np.array_equal(given["noise"], vlm.prompts(CONVERSATIONS, "noise", seed=4).given)


def test_none_leaves_the_parts_out():
    plain = [user(picture(0), "What color is it?"), user("Is there a ball?")]
    found, want = facade().prompts(CONVERSATIONS[:2], "none"), facade().prompts(plain)
    assert found.latents is None and want.latents is None
    for one, other in zip(found.examples, want.examples, strict=True):
        assert one.tokens.tolist() == other.tokens.tolist()


@pytest.mark.parametrize(
    ("conversations", "mode", "message"),
    [
        ([user({"type": "imagine", "text": " "})], "own", "holds no text"),
        ([user(SILENT, {"type": "imagine", "text": "a ball"})], "own", "expected it to be its conversation's only one"),
        ([user("a", SILENT)], "shuffled", "expected at least two"),
        ([user("a", SILENT)], "others", "latents: got 'others', expected one of own, zero"),
    ],
)
def test_bad_parts_and_modes_are_named(conversations, mode, message):
    with pytest.raises(UserError, match=message):
        facade().prompts(conversations, mode)


def test_a_model_without_a_head_says_so():
    vlm = VLM(facade().model.__class__(facade().model.vlm, None), facade().codec, None, (574,), "plain")
    with pytest.raises(UserError, match="plain: has no latent head"):
        vlm.prompts([user("a", SILENT)])
    assert len(vlm.generate([user("a")], max_new_tokens=2)) == 1
