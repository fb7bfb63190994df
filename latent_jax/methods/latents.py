"""An image's latents: what the frozen encoder sees pooled to a grid, its statistics, and its way back into the model.

Methods that predict latents declare `Latent` as a section and share what follows from it (docs/methods.md).
"""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from latent_jax.config.fields import option
from latent_jax.config.training import Data
from latent_jax.errors import UserError
from latent_jax.losses.pooling import adaptive_pool
from latent_jax.methods.contract import Batch, HostBatch
from latent_jax.models.heads import LatentVLM
from latent_jax.models.qwen2_5_vl.config import ModelConfig
from latent_jax.models.qwen2_5_vl.model import Qwen2_5_VL, encode

READOUTS = ("slots", "last_token", "mean_text")


@dataclasses.dataclass(frozen=True)
class Latent:
    """What is predicted, and where from."""

    grid: int = option(4, "side s of the pooled grid; an image has S = s * s latents", low=1, high=64)
    space: str = option(
        "merged", "merged: the language model's input space; encoder: before the merger", choices=("merged", "encoder")
    )
    readout: str = option("slots", "which hidden states the head reads", choices=READOUTS)
    width: int = option(0, "width of the head's MLP; 0 = twice the target's", low=0)
    scale: str = option("rms", "targets are divided by one number (rms) or one a channel (std)", choices=("rms", "std"))
    statistics_examples: int = option(512, "images that the targets' mean and scale are measured on", low=2)
    captions: str = option("random", "which of an image's captions an example takes", choices=("random", "first"))


@runtime_checkable
class LatentConfig(Protocol):
    """The config of any method that declares `Latent`."""

    @property
    def latent(self) -> Latent: ...

    @property
    def data(self) -> Data: ...


def imagined_grid(latent: Latent) -> tuple[int, int]:
    """Merged rows and columns that imagined latents stand for where an image's tokens would."""
    if latent.space == "merged":
        return latent.grid, latent.grid
    if latent.grid % 2:  # every published merger takes 2 x 2 patches
        raise UserError(
            f"latent.grid {latent.grid}: pre-merger latents are fed back through the merger, which takes "
            "2 x 2 of them; expected an even grid"
        )
    return latent.grid // 2, latent.grid // 2


def target_size(model_config: ModelConfig, space: str) -> int:
    return model_config.text.hidden_size if space == "merged" else model_config.vision.hidden_size


def targets(
    model_config: ModelConfig, encoded: tuple[Array, Array, Any], batch: Batch, latent: Latent
) -> Float[Array, "G E S Z"]:
    """Targets in the encoder's own space, fp32, without gradient: the batch's own, else pooled from its images.

    `encoded`: what the vision tower gave, (merged tokens, features before the merger, ...).
    """
    if "target_latents" in batch:
        return batch["target_latents"].astype(jnp.float32)
    unit = model_config.vision.spatial_merge_size
    merged, before = encoded[:2]
    if latent.space == "merged":
        step = unit**2
        features, image, cells = merged, batch["patch_image"][:, ::step], batch["patch_positions"][:, ::step] // unit
        grid = batch["target_grid"][:, :, 0]
    else:
        features, image, cells = before, batch["patch_image"], batch["patch_positions"]
        grid = batch["target_grid"][:, :, 0] * unit
    pool = jax.vmap(functools.partial(adaptive_pool, side=latent.grid))
    return jax.lax.stop_gradient(pool(features, image, cells, batch["target_image"][..., 0], grid))


def measure(
    model: LatentVLM, batches: Iterable[HostBatch], latent: Latent, image_patches: int
) -> dict[str, np.ndarray]:
    """{path: value} of the statistics that a head for these latents keeps, from batches with leading (A, G).

    Mean of every channel of the targets, and their scale: one number, the RMS of all centred channels (keeps which
    channels are large), or each channel's own standard deviation. Sums run in float64 on the host.
    """

    @jax.jit
    def moments(model: LatentVLM, batch: Batch) -> tuple[Array, Array, Array]:
        encoded = encode(model.vlm.vision, model.vlm.config, batch, image_patches=image_patches)
        z = targets(model.vlm.config, encoded, batch, latent)
        valid = jnp.broadcast_to(batch["target_mask"], z.shape[:-1])
        z = jnp.where(valid[..., None], z, 0)
        return valid.sum(), z.sum((0, 1, 2)), (z * z).sum((0, 1, 2))

    count, total, squares = (np.zeros(()),) * 3
    for batch in batches:
        for micro in range(len(batch["tokens"])):
            found = moments(model, {key: value[micro] for key, value in batch.items()})
            n, s, q = (np.asarray(x, np.float64) for x in found)
            count, total, squares = count + n, total + s, squares + q
    if not count:
        raise UserError("the data holds no image to measure the latent targets' statistics on")
    mean = total / count
    variance = np.maximum(squares / count - mean**2, 1e-12)
    if latent.scale == "rms":
        variance = np.full_like(variance, variance.mean())
    return {"head.mean": mean.astype(np.float32), "head.scale": np.sqrt(variance).astype(np.float32)}


def as_inputs(vlm: Qwen2_5_VL, latents: Float[Array, "X S Z"], latent: Latent) -> Float[Array, "X M D"]:
    """Latents in the encoder's own space as the input embeddings that an image's tokens would be."""
    return merge_latents(vlm, latents, latent.grid) if latent.space == "encoder" else latents


def merge_latents(vlm: Qwen2_5_VL, latents: Float[Array, "X S Z"], side: int) -> Float[Array, "X M D"]:
    """Pre-merger latents on a side x side grid through the frozen merger, in reading order of the merged grid."""
    X, _, Z = latents.shape
    merge = vlm.config.vision.spatial_merge_size
    cells = latents.reshape(X, side // merge, merge, side // merge, merge, Z).swapaxes(2, 3)
    return vlm.vision.merger(cells.reshape(X, side * side, Z).astype(vlm.vision.merger.fc1.dtype))
