"""What {"type": "imagine"} parts of a conversation stand for, at inference.

The method that trained the model says what is thought over and what the answer sees (methods/contract.py, `Think`);
whatever else may stand there instead comes as arrays (analysis/interventions.py).
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from latent_jax import methods
from latent_jax.config import fields
from latent_jax.config.training import Config
from latent_jax.data import prompt_batch
from latent_jax.data.chat import Processor
from latent_jax.data.layout import Example, Slots
from latent_jax.data.messages import check as check_messages
from latent_jax.data.messages import imagine_parts, without_imagined
from latent_jax.errors import UserError
from latent_jax.inference import batches, spans
from latent_jax.methods.contract import Batch, Messages, Span, Think
from latent_jax.models.heads import LatentVLM


class NoThought(UserError):
    """A conversation asks for latents that the model cannot predict."""


class Thought(NamedTuple):
    """What one imagine part stands for: latents (S, Z) in the space that they are predicted in, fp32, and the input
    embeddings (M, D) that the answer sees."""

    latents: np.ndarray
    inputs: np.ndarray


def think(
    models: Sequence[LatentVLM],
    processor: Processor,
    settings: Config | None,
    conversations: Sequence[Messages],
    *,
    variant: str = "",
    temperature: float = 0.0,
    seed: int = 0,
) -> list[list[Thought]]:
    """For every conversation what its imagine parts stand for, in their order; shared among copies of the model.

    settings: the config of the method that trained the model, or None. variant: one of its `Think.variants`, "" the
    first. A thought depends on its own conversation and the seed alone. Raises UserError for parts that mean nothing,
    and NoThought where the model cannot imagine.
    """
    wanted = [asked(messages) for messages in conversations]
    if not any(wanted):
        return [[] for _ in conversations]
    way, config = way_of(settings)
    if variant not in ("", *way.variants):
        raise UserError(f"variant: got {variant!r:.100}, expected one of {', '.join(way.variants)}")
    shape = way.shape(config)
    for part in (part for parts in wanted for part in parts):
        if part.get("grid") not in (None, shape, list(shape) if isinstance(shape, tuple) else shape):
            raise UserError(f"an 'imagine' part's grid is {fields.shown(part['grid'])}, expected the model's {shape}")
    layouts = [
        layout
        for messages, parts in zip(conversations, wanted, strict=True)
        if parts
        for layout in way.layouts(messages, config, processor, variant or way.variants[0])
    ]
    examples = [processor.lay_out(layout) for layout in layouts]
    marks = batches.marks(examples)

    def run(model: LatentVLM, share: np.ndarray) -> list[Thought]:
        laid = prompt_batch.packed([examples[i] for i in share], model.vlm.config)
        static = with_images(config, laid.image_patches)
        keys = batches.keys(np.uint32(seed), np.pad(marks[share], ((0, len(laid.lengths) - len(share)), (0, 0))))
        latents, inputs = _run(model, laid.batch, keys, np.float32(temperature), way=way, config=static)
        found = zip(np.asarray(latents.astype(jnp.float32)), np.asarray(inputs), strict=True)
        return [Thought(*each) for each, _ in zip(found, share, strict=False)]

    thoughts = iter(batches.divide(models, len(examples), run))
    return [[next(thoughts) for _ in parts] for parts in wanted]


@functools.partial(jax.jit, static_argnames=("way", "config"))
def _run(
    model: LatentVLM, batch: Batch, keys: Key[Array, " X"], temperature: Float[Array, ""], *, way: Think, config: Config
) -> tuple[Array, Array]:
    return way.run(model, batch, config, keys, temperature)


# A given answer: its text, or text and latents parts in order.
Given = str | Sequence[dict]


class Prompts(NamedTuple):
    """Conversations laid out for an answer, and the features (Y, D) of their given Slots, in order."""

    examples: list[Example]
    given: np.ndarray


def prompts(
    processor: Processor,
    settings: Config | None,
    hidden: int,
    conversations: Sequence[Messages],
    inputs: Sequence[Sequence[np.ndarray]],
    answers: Sequence[Given] | None = None,
) -> Prompts:
    """Lays conversations out for an answer.

    inputs: for every conversation what stands in the place of its imagine parts, (M, D) each; () leaves them out.
    hidden: D. answers: given answers, which end the sequences; their texts carry loss. Raises UserError where an array
    does not fit its place.
    """
    if len(inputs) != len(conversations):
        raise UserError(f"thoughts: got those of {len(inputs)} conversations, expected {len(conversations)}")
    shape = None
    if any(map(len, inputs)):
        way, config = way_of(settings)
        shape = way.shape(config)
    examples, given = [], [np.zeros((0, hidden), np.float32)]
    for number, (messages, own) in enumerate(zip(conversations, inputs, strict=True)):
        parts = asked(messages)
        if len(own) not in (0, len(parts)):
            raise UserError(f"thoughts of conversation {number}: got {len(own)}, expected none or {len(parts)}")
        said = list(messages) if own else without_imagined(messages)
        if shape is not None:
            given += [_fitting(array, shape, hidden, f"thoughts of conversation {number}") for array in own]
        if answers is not None:
            content, where = answers[number], f"answer {number}"
            if not isinstance(content, str) and _holds_latents(content, where):
                # As `generate` sees it: a span's size may depend on all of the prompt.
                asked_for = processor.lay_out(processor.render(said, True, imagined_grid=shape))
                wanted = spans.shape_of(span_of(settings), asked_for, settings)
                content, latents = _with_latents(content, wanted, hidden, where)
                given += latents
            said.append({"role": "assistant", "content": content})
        examples.append(processor.lay_out(processor.render(said, answers is None, imagined_grid=shape)))
    return Prompts(examples, np.concatenate(given, dtype=given[-1].dtype))


def _holds_latents(content: Sequence[dict], where: str) -> bool:
    """Whether a given answer holds latents. Raises UserError for a part that is neither these nor text."""
    for part in content:
        if not isinstance(part, dict) or part.get("type") not in ("text", "latents"):
            raise UserError(f"{where}: a part {part!r:.100}; expected text or latents")
    return any(part["type"] == "latents" for part in content)


def _with_latents(
    content: Sequence[dict], shape: int | tuple[int, int], hidden: int, where: str
) -> tuple[list[dict], list[np.ndarray]]:
    """(the content with imagine parts in the place of its latents, these latents)."""
    parts, latents = [], []
    for part in content:
        if part["type"] == "latents":
            latents.append(_fitting(part.get("latents"), shape, hidden, where))
            part = {"type": "imagine", "grid": shape}
        parts.append(part)
    return parts, latents


def _fitting(array: object, shape: int | tuple[int, int], hidden: int, where: str) -> np.ndarray:
    """The array. Raises UserError where it is none of the inputs of a part of this shape."""
    expected = (Slots(shape).count, hidden)
    try:
        found = np.asarray(array)
        found = found if jnp.issubdtype(found.dtype, jnp.floating) else found.astype(np.float32)
        finite = bool(np.isfinite(found.astype(np.float32)).all())
    except (TypeError, ValueError):
        raise UserError(f"{where}: got {array!r:.100}, expected an array of {expected} finite numbers") from None
    if found.shape != expected or not finite:
        raise UserError(f"{where}: an array of shape {found.shape}, expected {expected} finite numbers")
    return found


def asked(messages: Messages) -> list[dict]:
    """The imagine parts of a conversation, checked."""
    check_messages(messages)
    return imagine_parts(messages)


def way_of(settings: Config | None) -> tuple[Think, Config]:
    """How a method thinks before an answer, and its settings. Raises NoThought where it does not."""
    way = methods.find(settings.method).think if settings else None
    if way is None or settings is None:
        raise NoThought("an 'imagine' part needs a latent head; expected a checkpoint of latent pretraining")
    return way, settings


def span_of(settings: Config | None) -> Span:
    """How the method of these settings writes latents inside an answer. Raises UserError where it does not."""
    span = methods.find(settings.method).span if settings else None
    if not span:
        raise UserError("an answer with latents, of a model that writes none inside its answers")
    return span


def with_images(settings: Config, image_patches: int) -> Config:
    """Settings that tell the most patches of an image in a batch at hand: static, as all of a compiled program's."""
    return dataclasses.replace(settings, data=dataclasses.replace(settings.data, image_patches=image_patches))
