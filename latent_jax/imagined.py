"""What {"type": "imagine"} parts of a conversation stand for, at inference; and what may be put in their place.

A part with "text" stands for the image that the text describes (latent pretraining's caption sequence). A part without
stands for latents predicted from all that was said before it in the conversation (methods/imagine.py).
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from latent_jax import generate
from latent_jax.benchmarks.settings import LATENTS
from latent_jax.data import rows
from latent_jax.data.chat import Codec
from latent_jax.data.layout import Example
from latent_jax.data.messages import check as check_messages
from latent_jax.errors import UserError
from latent_jax.methods import imagine, pretrain
from latent_jax.models.heads import LatentHead, LatentVLM

Messages = Sequence[dict[str, Any]]


class NoHead(UserError):
    """A conversation asks for latents that the model cannot predict."""


class Prompts(NamedTuple):
    """Conversations laid out, what their imagine parts stand for as inputs, and the predicted latents (X, S, Z), in the
    order of the parts."""

    examples: list[Example]
    given: Float[Array, "Y D"]
    latents: Float[Array, "X S Z"] | None


def prompts(
    model: LatentVLM,
    codec: Codec,
    latent: pretrain.Latent | None,
    conversations: Sequence[Messages],
    mode: str = "own",
    seed: int = 0,
) -> Prompts:
    """Lays conversations out for an answer. `mode`: what stands where latents were predicted, see `replaced`; `none`
    leaves the parts out. Raises UserError for parts that mean nothing, or a mode that does not exist."""
    if not isinstance(mode, str) or mode not in LATENTS:
        raise UserError(f"latents: got {mode!r:.100}, expected one of {', '.join(LATENTS)}")
    for messages in conversations:
        check_messages(messages)
    parts_of = [asked(messages) for messages in conversations]
    if mode == "none" or not any(parts_of):
        shown = [codec.render(without(messages), add_generation_prompt=True) for messages in conversations]
        nothing = jnp.zeros((1, model.vlm.config.text.hidden_size))
        return Prompts([codec.lay_out(layout) for layout in shown], nothing, None)
    if model.head is None or latent is None:
        raise NoHead("an 'imagine' part needs a latent head; expected a checkpoint of latent pretraining")
    grid = pretrain.imagined_grid(latent)
    for part in (part for parts in parts_of for part in parts):
        if part.get("grid") not in (None, grid, list(grid)):
            raise UserError(f"an 'imagine' part's grid is {part['grid']!r:.80}, expected the model's {grid}")
    shown = [codec.render(messages, add_generation_prompt=True, imagined_grid=grid) for messages in conversations]
    texts = [part["text"] for parts in parts_of for part in parts if "text" in part]
    silent = [i for i, parts in enumerate(parts_of) if any("text" not in part for part in parts)]
    captions = [codec.lay_out(pretrain.imagine_layout(text, latent)) for text in texts]
    described = iter(from_texts(model, captions, latent) if texts else ())
    firsts = [codec.lay_out(imagine.with_slots(shown[i])) for i in silent]
    contextual = iter(from_context(model, firsts) if firsts else ())
    latents = [next(described if "text" in part else contextual) for parts in parts_of for part in parts]
    stacked = jnp.stack(latents)
    inputs = pretrain.as_inputs(model.vlm, replaced(stacked, mode, model.head, seed), latent)
    return Prompts([codec.lay_out(layout) for layout in shown], jnp.concatenate(inputs), stacked)


def asked(messages: Messages) -> list[dict]:
    """The imagine parts of a conversation: any number with text, or one without. Raises UserError for anything else."""
    content = (message["content"] for message in messages if not isinstance(message["content"], str))
    found = [part for parts in content for part in parts if part.get("type") == "imagine"]
    texts = [part["text"] for part in found if "text" in part]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise UserError("an 'imagine' part holds no text; expected a description, or no 'text' at all")
    if len(found) > 1 and any("text" not in part for part in found):
        raise UserError(
            "an 'imagine' part without 'text' beside another; expected it to be its conversation's only one"
        )
    return found


def without(messages: Messages) -> list[dict]:
    """The conversation with its imagine parts taken out."""
    return [
        message
        if isinstance(message["content"], str)
        else {**message, "content": [part for part in message["content"] if part.get("type") != "imagine"]}
        for message in messages
    ]


def replaced(latents: Float[Array, "X S Z"], mode: str, head: LatentHead, seed: int) -> Float[Array, "X S Z"]:
    """What stands in the place of X predicted latents, in the encoder's own space.

    own: themselves. zero: zeros. mean: the dataset's mean. noise: draws with the dataset's mean and scale. shuffled:
    each that of the one half a batch away (neighbours may ask about one image), which a batch of one lacks (UserError).
    """
    if mode == "zero":
        return jnp.zeros_like(latents)
    if mode == "mean":
        return jnp.broadcast_to(head.mean[...], latents.shape)
    if mode == "noise":
        return head.restore(jax.random.normal(jax.random.key(seed), latents.shape))
    if mode == "shuffled":
        if len(latents) < 2:
            raise UserError("latents: 'shuffled' with one imagine part in the batch; expected at least two")
        return jnp.roll(latents, len(latents) // 2, axis=0)
    return latents


def from_texts(model: LatentVLM, examples: Sequence[Example], latent: pretrain.Latent) -> Float[Array, "X S Z"]:
    """Latents of described images, fp32, in the encoder's space, from laid-out captions (pretrain.imagine_layout)."""
    laid = rows.one_per_row(examples, model.vlm.config)
    return _read(model, laid.batch, latent.readout, laid.image_patches)


def from_context(model: LatentVLM, examples: Sequence[Example]) -> Float[Array, "X S Z"]:
    """Latents at the slots of laid-out conversations, fp32, in the encoder's space."""
    laid = rows.one_per_row(examples, model.vlm.config)
    return _read(model, laid.batch, "slots", laid.image_patches)


@functools.partial(jax.jit, static_argnames=("readout", "image_patches"))
def _read(model: LatentVLM, batch: dict[str, Array], readout: str, image_patches: int) -> Float[Array, "X S Z"]:
    x = generate.embed(model.vlm, batch, model.head.slots[...], image_patches)
    hidden, _ = model.vlm.decode(x, batch)
    return model.head.restore(model.head(pretrain.read(hidden, model.head, batch, readout)))[0]
