"""Latent pretraining: predict, from a caption alone, what the frozen encoder sees (docs/methods.md).

Loss = w_t next-token(caption) + w_s similarity(z_hat, z) + w_a alignment over the batch, with a share of ordinary
image -> caption examples (replay) so that the model does not forget how to see.
"""

import dataclasses
import math
import typing
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from latent_jax.config.fields import option
from latent_jax.config.training import Config
from latent_jax.data.layout import Layout, Read, Room, Slots, Text, with_learned_slots
from latent_jax.data.messages import imagine_parts
from latent_jax.data.prompts import describe
from latent_jax.errors import UserError
from latent_jax.losses import alignment, next_token, similarity
from latent_jax.losses.schedule import piecewise
from latent_jax.methods.contract import (
    Batch,
    CachedTargets,
    HostBatch,
    Messages,
    Method,
    Processor,
    Record,
    Statistics,
    Terms,
    Think,
)
from latent_jax.methods.latents import Latent, LatentConfig, as_inputs, imagined_grid, measure, target_size, targets
from latent_jax.models.heads import LatentHead, LatentVLM
from latent_jax.models.qwen2_5_vl.config import ModelConfig
from latent_jax.models.qwen2_5_vl.model import encode
from latent_jax.models.qwen2_5_vl.vision import VisionTower

SIMILARITIES = typing.get_args(similarity.Kind)
# The alignment losses, with where their learned (log scale, bias) start: CLIP's 1 / .07, SigLIP's 10 and -10.
ALIGNMENTS = {"infonce": (math.log(1 / 0.07), 0.0), "sigmoid": (math.log(10), -10.0), "relational": (0.0, 0.0)}


@dataclasses.dataclass(frozen=True)
class Loss:
    """The three terms. A schedule is a list of (fraction of the run, factor) points, linear between them."""

    next_token_weight: float = option(1.0, "weight of the caption's next-token loss", low=0.0)
    next_token_schedule: tuple[tuple[float, float], ...] = option(
        (), "points (fraction of the run, factor)", ascending=True
    )
    similarity: str = option("l2", "how far a predicted latent is from its target", choices=SIMILARITIES)
    similarity_weight: float = option(1.0, "weight of the similarity loss", low=0.0)
    similarity_schedule: tuple[tuple[float, float], ...] = option(
        (), "points (fraction of the run, factor)", ascending=True
    )
    norm_weighted: bool = option(False, "cosine, contrastive: weight each slot by its target's squared norm")
    norm_term: float = option(0.0, "cosine, contrastive: weight of the squared difference of norms", low=0.0)
    smooth_l1_beta: float = option(1.0, "smooth_l1 only: where the square turns into the line", low=1e-6)
    temperature: float = option(0.1, "contrastive only: temperature of the InfoNCE among slots", low=1e-4)
    alignment: str = option("infonce", "how predictions are matched to a batch's targets", choices=tuple(ALIGNMENTS))
    alignment_weight: float = option(0.1, "weight of the alignment loss", low=0.0)
    alignment_schedule: tuple[tuple[float, float], ...] = option(
        (), "points (fraction of the run, factor)", ascending=True
    )


@dataclasses.dataclass(frozen=True)
class PretrainConfig(Config):
    """The config of a run."""

    loss: Loss = Loss()
    latent: Latent = Latent()


HEAD_SETTINGS = ("latent.grid", "latent.space", "latent.readout")  # what decides what a head predicts and reads
TERMS = ("next_token", "similarity", "alignment")


# ---------------------------------------------------------------- host half


def layout(record: Record, index: int, config: PretrainConfig, processor: Processor) -> Layout:
    """Caption -> slots, or, for the replay share, image -> caption. Deterministic in (record, index, config)."""
    captions = _captions(record)
    choice = 0
    if config.latent.captions == "random":
        choice = int(np.random.default_rng((config.seed, index)).integers(len(captions)))
    if _replayed(index + 1, config.data.replay) > _replayed(index, config.data.replay):
        return describe(record, captions[choice], processor)
    return target_layout(captions[choice], record, config.latent)


def _captions(record: Record) -> list[str]:
    """Raises UserError where the record has none."""
    if not record["captions"]:
        raise UserError(
            f"record {record['key']!r}: has no caption; expected image-caption pairs: config.data.name names a dataset "
            "of captions"
        )
    return record["captions"]


def _replayed(count: int, share: float) -> int:
    """How many of the first `count` examples are replay: evenly spread, so that every batch holds its share exactly."""
    return math.floor(count * share + 1e-6)  # 22 * (15 / 22) is a little less than 15


def imagine_layout(caption: str, latent: Latent, images: tuple[bytes, ...] = (), key: str = "") -> Layout:
    """The sequence whose slots predict an image's latents; no image token enters the language model."""
    ends = {
        "slots": (Slots((latent.grid, latent.grid)),),
        "last_token": (Read(), Text("<|im_end|>")),
        "mean_text": (Text("<|im_end|>"),),
    }
    trunk = (Text("<|im_start|>"), Text(caption, loss=True), *ends[latent.readout])
    return Layout(images=images, trunk=trunk, targets=(0,) if images else (), key=key)


def target_layout(caption: str, record: Record, latent: Latent) -> Layout:
    """Caption -> slots that predict the record's image: from its pixels, or from its latents where it brings them."""
    given = record.get("latents")
    images = tuple(record["images"][:1]) if given is None else ()
    return dataclasses.replace(imagine_layout(caption, latent, images, record["key"]), latents=given)


# ---------------------------------------------------------------- device half


def build_head(model_config: ModelConfig, config: PretrainConfig, rngs: nnx.Rngs) -> LatentHead:
    """The latent head for a language model of this shape."""
    target = target_size(model_config, config.latent.space)
    scale, bias = ALIGNMENTS[config.loss.alignment]
    return LatentHead(
        config.latent.grid**2,
        model_config.text.hidden_size,
        target,
        config.latent.width or 2 * target,
        logit_scale=scale,
        logit_bias=bias,
        rngs=rngs,
    )


def room(config: PretrainConfig) -> Room:
    """An image to predict, and what its latents are read from."""
    readout = config.latent.readout
    return Room(slots=config.latent.grid**2 if readout == "slots" else 0, targets=1, reads=int(readout == "last_token"))


def fit_layout(record: Record, index: int, config: PretrainConfig, processor: Processor) -> Layout:
    """What `fit` measures: every image as a target."""
    return target_layout(_captions(record)[0], record, config.latent)


def cache_layout(record: Record, config: PretrainConfig) -> Layout:
    """What a latent cache encodes: the image alone, whatever its captions are."""
    return imagine_layout("", config.latent, tuple(record["images"][:1]), record["key"])


def fit(model: LatentVLM, batches: Iterable[HostBatch], config: PretrainConfig) -> dict[str, np.ndarray]:
    """The head's statistics from batches of `fit_layout`, before training starts: {path: value}."""
    return measure(model, batches, config.latent, config.data.image_patches)


def coefficients(config: PretrainConfig, fraction: Float[Array, ""]) -> dict[str, Float[Array, ""]]:
    """The weight of every term at this fraction of the run."""
    loss = config.loss
    return {t: getattr(loss, f"{t}_weight") * piecewise(getattr(loss, f"{t}_schedule"), fraction) for t in TERMS}


def weights(batch: Batch, config: PretrainConfig) -> dict[str, Float[Array, ""]]:
    """What every term's sum is divided by: supervised tokens, slots, examples. Known from the batch alone."""
    examples = batch["target_mask"].sum().astype(jnp.float32)
    slots = config.latent.grid**2
    return {"next_token": batch["loss_weights"].sum(), "similarity": examples * slots, "alignment": examples}


def cache_targets(
    vision: VisionTower, model_config: ModelConfig, batch: Batch, config: PretrainConfig
) -> Float[Array, "G E S Z"]:
    """The targets of a batch of `cache_layout`, as a latent cache keeps them."""
    encoded = encode(vision, model_config, batch, image_patches=config.data.image_patches)
    return targets(model_config, encoded, batch, config.latent)


def think_layouts(messages: Messages, config: LatentConfig, processor: Processor, variant: str) -> list[Layout]:
    """What is thought over for every imagine part: the caption sequence of its text, or, of the one part without text,
    the conversation up to the answer with slots in the part's place."""
    found = []
    for part in imagine_parts(messages):
        if "text" in part:
            found.append(imagine_layout(part["text"], config.latent))
        else:
            shown = processor.render(messages, add_generation_prompt=True, imagined_grid=imagined_grid(config.latent))
            found.append(with_learned_slots(shown))
    return found


def think(
    model: LatentVLM, batch: Batch, config: LatentConfig, keys: Key[Array, " X"], temperature: Float[Array, ""]
) -> tuple[Float[Array, "X S Z"], Float[Array, "X M D"]]:
    """(latents (X, S, Z) fp32 in the encoder's own space, the input embeddings (X, M, D) that they stand for)."""
    merged, _, _ = model.vlm.encode(batch, image_patches=config.data.image_patches)
    slots = jnp.broadcast_to(model.head.slots[...], (1, *model.head.slots.shape)).astype(merged.dtype)
    x = model.vlm.embed(batch["tokens"], batch["feature_index"], jnp.concatenate([merged, slots], axis=1))
    hidden, _ = model.vlm.decode(x, batch)
    found = read(hidden, model.head, batch, config.latent.readout)
    if config.latent.readout != "slots" and "slot_index" in batch:  # latents of a context are always read at slots
        at_slots = read(hidden, model.head, batch, "slots")
        found = jnp.where(batch["slot_mask"][..., None], at_slots, found)
    latents = model.head.unstandardise(model.head(found))[0]
    return latents, as_inputs(model.vlm, latents, config.latent)


def read(hidden: Float[Array, "G B T D"], head: LatentHead, batch: Batch, readout: str) -> Float[Array, "G E S D"]:
    """The hidden states that the head reads."""
    G, B, T, D = hidden.shape
    flat = hidden.reshape(G, B * T, D)
    if readout == "slots":
        return jax.vmap(lambda h, i: h[i])(flat, batch["slot_index"])
    if readout == "last_token":
        text = jax.vmap(lambda h, i: h[i])(flat, batch["read_index"][..., 0])
    else:
        # The caption's tokens are those that are predicted: a weight stands one place before its token.
        ids = batch["segment_ids"].reshape(G, B * T)
        spoken = jnp.roll(batch["loss_weights"].reshape(G, B * T), 1, axis=1) > 0
        places = jnp.arange(1, batch["example_mask"].shape[1] + 1)
        inside = (ids[:, None] == places[:, None]) & spoken[:, None]
        share = inside / jnp.maximum(inside.sum(-1, keepdims=True), 1)
        text = jnp.einsum("GEX,GXD->GED", share.astype(flat.dtype), flat)
    # One vector for every slot: the slot's embedding tells the head which cell is asked for.
    return text[:, :, None] + head.slots[...].astype(text.dtype)


def forward(
    model: LatentVLM, batch: Batch, config: PretrainConfig
) -> tuple[Float[Array, "G B T D"], Float[Array, "G E S Z"], Float[Array, "G E S Z"]]:
    """(hidden states, predicted and target standardised latents in fp32)."""
    options = dict(remat=config.model.remat, unroll=config.model.unroll)
    encoded = model.vlm.encode(batch, image_patches=config.data.image_patches, **options)
    merged = encoded[0]
    slots = jnp.broadcast_to(model.head.slots[...], (merged.shape[0], *model.head.slots.shape)).astype(merged.dtype)
    x = model.vlm.embed(batch["tokens"], batch["feature_index"], jnp.concatenate([merged, slots], axis=1))
    hidden, _ = model.vlm.decode(x, batch, **options)
    target = model.head.standardise(targets(model.vlm.config, encoded, batch, config.latent))
    predicted = model.head(read(hidden, model.head, batch, config.latent.readout))
    return hidden, predicted, target


def loss(model: LatentVLM, batch: Batch, config: PretrainConfig) -> tuple[Terms, Terms]:
    """({term: (sum, weight)}, {metric: (sum, weight)}) of one micro-step; batch arrays lead with G."""
    hidden, predicted, target = forward(model, batch, config)
    G, E, S, Z = predicted.shape
    predicted, target = predicted.reshape(G * E, S, Z), target.reshape(G * E, S, Z)
    mask = batch["target_mask"].reshape(G * E)
    T, D = hidden.shape[-2:]
    options = config.loss
    results = {
        "next_token": next_token.next_token(
            hidden.reshape(-1, T, D),
            model.vlm.text.head,
            batch["targets"].reshape(-1, T),
            batch["loss_weights"].reshape(-1, T),
        ),
        "similarity": similarity.similarity(
            predicted,
            target,
            mask,
            kind=typing.cast(similarity.Kind, options.similarity),
            norm_weighted=options.norm_weighted,
            norm_term=options.norm_term,
            beta=options.smooth_l1_beta,
            temperature=options.temperature,
        ),
        "alignment": align(predicted.mean(1), target.mean(1), mask, model.head, options.alignment),
    }
    terms = {name: (total, weight) for name, (total, weight, _) in results.items()}
    metrics = {f"{name}/{key}": value for name, (_, _, extra) in results.items() for key, value in extra.items()}
    return terms, metrics


def align(
    predicted: Float[Array, "E Z"], target: Float[Array, "E Z"], mask: Bool[Array, " E"], head: LatentHead, kind: str
) -> alignment.Result:
    """The alignment loss of pooled latents over the global batch of one micro-step."""
    if kind == "infonce":
        return alignment.infonce(predicted, target, mask, logit_scale=head.logit_scale[...])
    if kind == "sigmoid":
        return alignment.sigmoid(
            predicted, target, mask, logit_scale=head.logit_scale[...], logit_bias=head.logit_bias[...]
        )
    return alignment.relational(predicted, target, mask)


THINK = Think(shape=lambda config: imagined_grid(config.latent), layouts=think_layouts, run=think)

METHOD = Method(
    config=PretrainConfig,
    layout=layout,
    coefficients=coefficients,
    weights=weights,
    loss=loss,
    room=room,
    build_head=build_head,
    heads=("imagine",),
    head_settings=HEAD_SETTINGS,
    think=THINK,
    statistics=Statistics(lambda config: config.latent.statistics_examples, fit_layout, fit),
    targets=CachedTargets(
        images=lambda record: record["images"][:1],
        made_from=lambda config: {"grid": config.latent.grid, "space": config.latent.space},
        shape=lambda model_config, config: (config.latent.grid**2, target_size(model_config, config.latent.space)),
        layout=cache_layout,
        encode=cache_targets,
    ),
    report="latent_jax.analysis.probe",
)
