"""What a config leaves open, resolved: the model's shape and dtypes, the batch's static shape, what is recomputed.

Training and `plan` both call these functions, so that what is planned is what runs. No dataset is read here.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from latent_jax.config.training import PRESETS, Config, named_sizes
from latent_jax.data import batch_shapes
from latent_jax.data.image_spec import ImageSpec
from latent_jax.data.layout import Example
from latent_jax.data.packing import BatchShape, Size, size_of
from latent_jax.errors import UserError
from latent_jax.methods.contract import Method
from latent_jax.models import hf_io
from latent_jax.models.qwen2_5_vl.config import ModelConfig, VisionConfig


def choose(
    sample: Sequence[Example | Size],
    config: Config,
    method: Method,
    vision: VisionConfig,
    shards: int,
    memory: float = math.inf,
) -> BatchShape:
    """The batch's shape for examples like the sampled ones; a size that the config names is kept.

    shards: devices that see different groups. memory: bytes that a batch may take on the hosts. Raises UserError where
    the method makes no room for what it lays out, or lays out nothing that a loss could be of.
    """
    _check_room(sample, config, method)
    _check_scored(sample, config)
    return batch_shapes.choose(
        sample,
        batch_size=config.train.batch_size,
        groups=config.data.groups or shards,
        micro=config.train.accumulate,
        window_patches=vision.window_patches,
        merge_unit=vision.merge_unit,
        row_tokens=config.data.row_tokens,
        room=method.room(config),
        named=named_sizes(config.data),
        memory=memory,
    )


def _check_room(sample: Sequence[Example | Size], config: Config, method: Method) -> None:
    """Raises UserError where no sampled example fits the room that the method makes: no record is to blame."""
    sizes = [one if isinstance(one, Size) else size_of(one) for one in sample]
    room = method.room(config)
    for name in ("slots", "targets", "reads"):
        least = min(getattr(size, name) for size in sizes)
        if least > getattr(room, name):
            raise UserError(
                f"config.method: Method.room of {config.method} has {name}={getattr(room, name)}, but every sampled "
                f"example needs at least {least}"
            )


def _check_scored(sample: Sequence[Example | Size], config: Config) -> None:
    """Raises UserError where no sampled example has a supervised token, a target, a read or a slot: training would run
    to its end with a loss of 0."""
    examples = [one for one in sample if isinstance(one, Example)]
    if examples and not any(one.loss_weights.any() or any(dataclasses.astuple(size_of(one).room)) for one in examples):
        raise UserError(
            f"config.method: the layout of {config.method} leaves nothing to be scored in any of {len(examples)} "
            "sampled examples; expected Text(..., loss=True), targets, slots or reads"
        )


def check_groups(batch_shape: BatchShape, shards: int) -> None:
    """Raises UserError where the data shards cannot share a batch's groups."""
    if batch_shape.groups % shards:
        raise UserError(
            f"config.data.groups: {batch_shape.groups} groups cannot be shared by {shards} data shards "
            "(config.mesh.replica x config.mesh.fsdp); expected a multiple"
        )


def resolved(config: Config, batch_shape: BatchShape, platform: str) -> Config:
    """The config with nothing left open: the batch's sizes, and `remat` by the platform of the mesh's devices."""
    names = ("groups", "rows", "tokens", "patches", "image_patches")
    sizes = {name: getattr(batch_shape, name) for name in names}
    remat = config.model.remat
    if remat == "auto":
        remat = "none" if platform == "cpu" else "full"
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, **sizes),
        model=dataclasses.replace(config.model, remat=remat),
    )


def shape_file(config: Config, origin: Path) -> Path:
    """The file of the model's shape: a preset for random weights, else the checkpoint's own config.json."""
    named = config.model.init == "random" and config.model.preset
    return PRESETS / f"{config.model.preset}.json" if named else origin / "config.json"


def model_config(shape: ModelConfig, image: ImageSpec) -> ModelConfig:
    """The model's shape with its processor's normalisation, which the device applies."""
    return dataclasses.replace(shape, image_mean=image.mean, image_std=image.std)


def stored_dtypes(config: Config, origin: Path, shape: ModelConfig) -> dict[str, np.dtype]:
    """Our path -> dtype in the checkpoint, from its headers; nothing for random weights."""
    if config.model.init == "random":
        return {}
    return {f"vlm.{path}": weight.dtype for path, weight in hf_io.Checkpoint.open(origin).weights(shape).items()}
