"""The batch that a planned step takes: no data is read, so what an example holds comes from the method, or a rule."""

import dataclasses
from pathlib import Path

import jax
import numpy as np

from latent_jax.assets import TINY_VL
from latent_jax.config.training import Config
from latent_jax.data import packing, tokenizer
from latent_jax.data.chat import Processor
from latent_jax.data.image_spec import ImageSpec
from latent_jax.data.layout import Example, Room
from latent_jax.data.pipeline import naming
from latent_jax.errors import UserError
from latent_jax.methods.contract import Method
from latent_jax.models.qwen2_5_vl import flops
from latent_jax.models.qwen2_5_vl.config import ModelConfig, VisionConfig
from latent_jax.runtime import sharding
from latent_jax.training import resolve
from latent_jax.training.state import Setup

# Words beside an example's image or slots, where neither data nor the method says how many: a long caption.
TEXT_TOKENS = 64


@dataclasses.dataclass(frozen=True)
class Planned:
    """A batch's shape, the model's own work on a full one, and what an example was taken to be, in words."""

    batch_shape: packing.BatchShape
    work: flops.Work
    example: str


def planned(config: Config, method: Method, shape: ModelConfig, directory: Path | None, shards: int) -> Planned:
    """The batch that training would choose if every example were typical. Sizes that the config names are kept.

    directory: the checkpoint's, where it is on this machine. Raises UserError where an example does not fit what the
    config names, or where the typical record cannot be laid out.
    """
    record = method.typical(config) if method.typical else None
    if record is None:
        return _ruled(config, method, shape, directory, shards)
    processor, counted = _processor(config, shape, directory)
    try:
        with naming(record):
            example = processor.lay_out(method.layout(record, 0, config, processor), decode=False)
    except UserError as problem:
        raise UserError(f"config.method: Method.typical of {config.method}: {problem}") from problem
    batch_shape = resolve.choose([example], config, method, shape.vision, shards)
    resolve.check_groups(batch_shape, shards)
    return Planned(batch_shape, _full(example, batch_shape), f"as for {method_words(example)}{counted}")


def _processor(config: Config, shape: ModelConfig, directory: Path | None) -> tuple[Processor, str]:
    """The checkpoint's processor, or the embedded tokenizer with the model's patches; and a word on the latter."""
    limits = config.data.min_pixels or None, config.data.max_pixels or None
    if directory and any((directory / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        return Processor.from_directory(directory, *limits), ""
    vision = shape.vision
    image = image_spec(config, directory) or ImageSpec(
        patch_size=vision.patch_size,
        temporal_patch_size=vision.temporal_patch_size,
        merge_size=vision.spatial_merge_size,
        window_size=vision.window_size,
        min_pixels=config.data.min_pixels or ImageSpec.min_pixels,
        max_pixels=config.data.max_pixels or ImageSpec.max_pixels,
    )
    return Processor(tokenizer.read(TINY_VL), image), "; words counted by the embedded tokenizer"


def image_spec(config: Config, directory: Path | None) -> ImageSpec | None:
    """Of a checkpoint on this machine, as training reads it; None where its files do not say."""
    names = ("preprocessor_config.json", "processor_config.json")
    if directory is None or not any((directory / name).exists() for name in names):
        return None
    return ImageSpec.from_directory(directory, config.data.min_pixels or None, config.data.max_pixels or None)


def method_words(example: Example) -> str:
    """An example's contents in a line."""
    size, views = packing.size_of(example), int(example.view_ids.max(initial=0))
    found = [
        f"{size.tokens} tokens ({int((example.loss_weights != 0).sum())} supervised)",
        f"{views} view(s)" if views else "",
        f"{int(example.patch_image.max(initial=0))} image(s) of {size.patches} patches together",
        f"{size.slots} slots" if size.slots else "",
    ]
    return f"the method's typical record: {', '.join(filter(None, found))}"


def _full(example: Example, batch_shape: packing.BatchShape) -> flops.Work:
    """The work on a step that holds as many such examples as the packer puts into it."""
    places, count = packing.FirstFit(batch_shape), 0
    while places.place(packing.size_of(example)) is not None:
        count += 1
    one = flops.count(
        {
            "segment_ids": np.ones((1, len(example.tokens)), np.int32),
            "view_ids": example.view_ids[None],
            "loss_weights": example.loss_weights,
            "patch_image": example.patch_image[None],
            "patch_window": example.patch_window[None],
            "patches": example.patches,
        }
    )
    counts = {field.name: getattr(one, field.name) * count for field in dataclasses.fields(one)}
    return flops.Work(**counts | {"channels": batch_shape.channels})


def _ruled(config: Config, method: Method, shape: ModelConfig, directory: Path | None, shards: int) -> Planned:
    """For examples of one image of data.max_pixels and TEXT_TOKENS words; the work is that of full rows.

    Where neither config nor checkpoint bounds an image, it takes half a row.
    """
    vision, room, most = shape.vision, method.room(config), config.data.row_tokens // 2
    spec = image_spec(config, directory)
    pixels = spec.max_pixels if spec else config.data.max_pixels
    merged = min(pixels // (vision.patch_size * vision.spatial_merge_size) ** 2 or most, most)
    size = _size(merged, room, vision)
    batch_shape = resolve.choose([size], config, method, vision, shards)
    resolve.check_groups(batch_shape, shards)
    groups = batch_shape.micro * batch_shape.groups
    tokens, patches = groups * batch_shape.rows * batch_shape.tokens, groups * batch_shape.patches
    work = flops.Work(
        tokens=tokens,
        supervised=tokens * TEXT_TOKENS // size.tokens,
        pairs=tokens * min(size.tokens, batch_shape.tokens) / 2,
        patches=patches,
        window_pairs=patches * vision.window_patches,
        image_pairs=patches * size.patches,
        channels=batch_shape.channels,
    )
    return Planned(
        batch_shape,
        work,
        f"as for examples of one image of at most {batch_shape.image_patches} patches and {TEXT_TOKENS} text tokens",
    )


def _size(merged: int, room: Room, vision: VisionConfig) -> packing.Size:
    """Of an image of so many merged tokens, or the slots that stand in its place, and TEXT_TOKENS words."""
    return packing.Size(
        tokens=max(merged, room.slots) + TEXT_TOKENS,
        patches=merged * vision.merge_unit,
        slots=room.slots,
        channels=vision.in_channels * vision.patch_size**2,
        image_patches=merged * vision.merge_unit,
    )


def abstract_batch(batch_shape: packing.BatchShape, setup: Setup) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch's shapes, dtypes and shardings."""
    place = sharding.batch_sharding(setup.mesh)
    return {
        name: jax.ShapeDtypeStruct((batch_shape.micro, batch_shape.groups, *shape), dtype, sharding=place)
        for name, (shape, dtype) in packing.shapes(batch_shape).items()
    }
