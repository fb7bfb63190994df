"""Fine-tuning with imagination: the model predicts S latents after each question and answers over them.

[image] question <slots> -> latents = M_phi(hidden states at the slots) -> [image] question <latents> answer: the
latents stand in the second pass where the slots stood in the first, and the loss is next-token on the answer
(docs/methods.md). Gradients flow through the latents into the first pass. At inference the same happens once,
before decoding: a content part {"type": "imagine"} without text.
"""

import dataclasses
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from latent_jax.data.layout import Layout, Room, with_learned_slots
from latent_jax.errors import UserError
from latent_jax.methods import pretrain, sft
from latent_jax.methods.contract import Batch, HostBatch, Method, Processor, Record, Statistics, Terms
from latent_jax.methods.latents import Latent, imagined_grid, measure, target_size
from latent_jax.models.heads import LatentHead, LatentVLM
from latent_jax.models.qwen2_5_vl.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class ImagineConfig(sft.SftConfig):
    """The config of a run."""

    latent: Latent = Latent()


def layout(record: Record, index: int, config: ImagineConfig, processor: Processor) -> Layout:
    """Questions about the image as views of it, slots after each question; image -> caption as it is in `sft`."""
    shown = sft.conversations(record, index, config, imagine=True)
    grid = imagined_grid(config.latent)
    return with_learned_slots(processor.render_conversations(shown, imagined_grid=grid, key=record["key"]))


def room(config: ImagineConfig) -> Room:
    """Latents for each of an example's questions; a target where a new head's statistics are measured."""
    return Room(slots=config.latent.grid**2 * config.chat.questions, targets=1)


def build_head(model_config: ModelConfig, config: ImagineConfig, rngs: nnx.Rngs) -> LatentHead:
    """The latent head of pretraining; only its slots, its MLP and its statistics are used here."""
    if (config.latent.space, config.latent.readout) != ("merged", "slots"):
        raise UserError(
            f"config.latent: space {config.latent.space!r} with readout {config.latent.readout!r}; imagining after a "
            "question takes space 'merged' (the model's own input space) and readout 'slots'"
        )
    target = target_size(model_config, config.latent.space)
    width = config.latent.width or 2 * target
    return LatentHead(config.latent.grid**2, model_config.text.hidden_size, target, width, rngs=rngs)


def fit_layout(record: Record, index: int, config: ImagineConfig, processor: Processor) -> Layout:
    """What `fit` measures where the head is new: every image as a target."""
    return pretrain.imagine_layout("", config.latent, tuple(record["images"][:1]), record["key"])


def fit(model: LatentVLM, batches: Iterable[HostBatch], config: ImagineConfig) -> dict[str, np.ndarray]:
    """The statistics of a new head; one that was trained keeps those that it was trained with."""
    if np.any(model.head.mean[...]) or np.any(model.head.scale[...] != 1):
        return {}
    return measure(model, batches, config.latent, config.data.image_patches)


def loss(model: LatentVLM, batch: Batch, config: ImagineConfig) -> tuple[Terms, Terms]:
    """({term: (sum, weight)}, {metric: (sum, weight)}) of one micro-step; batch arrays lead with G."""
    options = dict(remat=config.model.remat, unroll=config.model.unroll)
    merged, _, _ = model.vlm.encode(batch, image_patches=config.data.image_patches, **options)
    G = len(merged)
    # Every question of an example has the same slots.
    slot = jnp.tile(model.head.slots[...], (config.chat.questions, 1)).astype(merged.dtype)
    features = jnp.concatenate([merged, jnp.broadcast_to(slot, (G, *slot.shape))], axis=1)
    x = model.vlm.embed(batch["tokens"], batch["feature_index"], features)
    first, _ = model.vlm.decode(x, batch, **options)
    latents = model.head.unstandardise(model.head(pretrain.read(first, model.head, batch, "slots")))
    x = replace(x, latents, batch["slot_index"], batch["slot_mask"])
    return sft.scored(model, x, batch, options)


def replace(
    x: Float[Array, "G B T D"], latents: Float[Array, "G E S D"], index: Int[Array, "G E S"], mask: Bool[Array, "G E S"]
) -> Float[Array, "G B T D"]:
    """The input with every slot's own latent in its place; `index` is flat in the group."""
    G, B, T, D = x.shape
    index = jnp.where(mask, index, B * T).reshape(G, -1)
    put = jax.vmap(lambda x, index, latents: x.at[index].set(latents.astype(x.dtype), mode="drop"))
    return put(x.reshape(G, B * T, D), index, latents.reshape(G, -1, D)).reshape(G, B, T, D)


METHOD = Method(
    config=ImagineConfig,
    layout=layout,
    coefficients=sft.coefficients,
    weights=sft.weights,
    loss=loss,
    room=room,
    build_head=build_head,
    heads=("pretrain",),
    head_settings=pretrain.HEAD_SETTINGS,
    passes=lambda config: 2,
    think=dataclasses.replace(pretrain.THINK, answers=True),
    statistics=Statistics(lambda config: config.latent.statistics_examples, fit_layout, fit),
)
