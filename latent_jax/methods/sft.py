"""Supervised fine-tuning: next-token loss on the assistant's turns only (docs/methods.md).

A record with questions becomes one example whose questions are views of one image: the image is encoded once, each
question sees the image and itself, and none sees another's answer.
"""

import dataclasses
import functools
import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import Array, Float

from latent_jax.benchmarks.items import conversation
from latent_jax.config.fields import option
from latent_jax.config.training import Config
from latent_jax.data.layout import Layout
from latent_jax.data.prompts import described
from latent_jax.errors import UserError
from latent_jax.losses import next_token
from latent_jax.losses.schedule import piecewise
from latent_jax.methods.contract import Batch, Method, Processor, Record, Terms
from latent_jax.models.heads import LatentVLM


@dataclasses.dataclass(frozen=True)
class Loss:
    """The one term."""

    next_token_weight: float = option(1.0, "weight of the next-token loss", low=0.0)
    next_token_schedule: tuple[tuple[float, float], ...] = option(
        (), "points (fraction of the run, factor)", ascending=True
    )


@dataclasses.dataclass(frozen=True)
class Chat:
    """How records become conversations."""

    questions: int = option(6, "most questions about one image in an example", low=1)
    captions: str = option("random", "which of an image's captions is asked for", choices=("random", "first"))
    prompt: str = option(
        "benchmark",
        "how questions are put: benchmark, as its official evaluation asks and wants them answered; plain, as they are",
        choices=("benchmark", "plain"),
    )
    suffix: str = option("", "plain only: what follows each question, such as an instruction to answer in one word")


@dataclasses.dataclass(frozen=True)
class SftConfig(Config):
    """The config of a run, which other methods that ask questions extend."""

    loss: Loss = Loss()
    chat: Chat = Chat()


def layout(record: Record, index: int, config: SftConfig, processor: Processor) -> Layout:
    """What example `index` shows: its conversations as views of the images that they share."""
    return processor.render_conversations(conversations(record, index, config), key=record["key"])


def conversations(record: Record, index: int, config: SftConfig, imagine: bool = False) -> list[list[dict]]:
    """A conversation for every question that example `index` asks; with `imagine`, each asks for latents as well.

    Image -> caption where the record has no questions.
    """
    if record["questions"]:
        return [
            [*conversation(prompt, record["images"], imagine), {"role": "assistant", "content": answer}]
            for prompt, answer in pairs(record, index, config)
        ]
    rng = np.random.default_rng((config.seed, index))
    choice = 0 if config.chat.captions == "first" else int(rng.integers(len(record["captions"])))
    return [described(record, record["captions"][choice])]


def pairs(record: Record, index: int, config: SftConfig) -> list[tuple[str, str]]:
    """(prompt, answer) of the questions that example `index` asks, drawn by seed and index.

    Raises UserError where none of the record's questions has an answer to learn.
    """
    benchmark = _benchmark(record.get("dataset", "")) if config.chat.prompt == "benchmark" else None
    if benchmark:
        found = [(benchmark.prompt(q, "official"), benchmark.answer(q)) for q in record["questions"]]
    else:
        found = [(q["question"] + config.chat.suffix, q["answer"]) for q in record["questions"]]
    found = [(prompt, answer) for prompt, answer in found if isinstance(answer, str) and answer]
    if not found:
        raise UserError(f"record {record['key']!r}: none of its questions has an answer to learn; expected a text")
    order = np.random.default_rng((config.seed, index)).permutation(len(found))[: config.chat.questions]
    return [found[i] for i in order]


@functools.cache
def _benchmark(dataset: str) -> ModuleType | None:
    """The dataset's benchmark, None where it has none."""
    try:
        found = importlib.import_module(f"latent_jax.benchmarks.{dataset}")
    except ModuleNotFoundError:
        return None
    return found if hasattr(found, "SCORERS") else None


def coefficients(config: SftConfig, fraction: Float[Array, ""]) -> dict[str, Float[Array, ""]]:
    """The weight of the one term at this fraction of the run."""
    return {"next_token": config.loss.next_token_weight * piecewise(config.loss.next_token_schedule, fraction)}


def weights(batch: Batch, config: SftConfig) -> dict[str, Float[Array, ""]]:
    """The sum of the term is divided by this: the supervised tokens of the batch."""
    return {"next_token": batch["loss_weights"].sum()}


def loss(model: LatentVLM, batch: Batch, config: SftConfig) -> tuple[Terms, Terms]:
    """({term: (sum, weight)}, {metric: (sum, weight)}) of one micro-step; batch arrays lead with G."""
    options = dict(remat=config.model.remat, unroll=config.model.unroll)
    merged, _, _ = model.vlm.encode(batch, image_patches=config.data.image_patches, **options)
    return scored(model, model.vlm.embed(batch["tokens"], batch["feature_index"], merged), batch, options)


def scored(
    model: LatentVLM, x: Float[Array, "G B T D"], batch: Batch, options: Mapping[str, Any]
) -> tuple[Terms, Terms]:
    """As `loss`, from input embeddings; options are `decode`'s."""
    hidden, _ = model.vlm.decode(x, batch, **options)
    T, D = hidden.shape[-2:]
    total, weight, extra = next_token.next_token(
        hidden.reshape(-1, T, D),
        model.vlm.text.head,
        batch["targets"].reshape(-1, T),
        batch["loss_weights"].reshape(-1, T),
    )
    return {"next_token": (total, weight)}, {f"next_token/{key}": value for key, value in extra.items()}


METHOD = Method(config=SftConfig, layout=layout, coefficients=coefficients, weights=weights, loss=loss)
