"""A model of a few ten thousand weights with the embedded tokenizer, and records to train it on."""

import functools
import io
import itertools
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from latent_jax.assets import TINY_VL
from latent_jax.config import schema
from latent_jax.data import packing
from latent_jax.data.chat import Processor
from latent_jax.methods import pretrain
from latent_jax.models.qwen2_5_vl.config import ModelConfig, from_json

COLORS, SHAPES = ("red", "green", "blue", "yellow"), ("ball", "cube", "cone", "star")
# Rows and columns in patches of 14 pixels; an attention window is 4 x 4 of them.
GRIDS = ((4, 4), (4, 6), (6, 4))


@functools.cache
def directory() -> Path:
    """A checkpoint directory without weights: four key/value heads, untied embeddings. Do not change."""
    folder = Path(tempfile.mkdtemp(prefix="latent_jax_small_"))
    shutil.copytree(TINY_VL, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors*"))
    shape = json.loads((folder / "config.json").read_text())
    shape |= dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=4)
    shape |= dict(num_hidden_layers=2, tie_word_embeddings=False)
    shape |= dict(rope_scaling=dict(type="mrope", mrope_section=[2, 3, 3]))
    shape["vision_config"] |= dict(hidden_size=32, num_heads=2, intermediate_size=48, out_hidden_size=64)
    (folder / "config.json").write_text(json.dumps(shape))
    edit = json.loads((folder / "preprocessor_config.json").read_text()) | dict(min_pixels=28 * 28)
    (folder / "preprocessor_config.json").write_text(json.dumps(edit))
    return folder


@functools.cache
def processor() -> Processor:
    return Processor.from_directory(directory())


def model_config() -> ModelConfig:
    return from_json(directory() / "config.json")


def record(index: int) -> dict:
    """A picture of noise with a caption and two questions; the same for the same index."""
    rng = np.random.default_rng(index)
    rows, columns = GRIDS[index % len(GRIDS)]
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (14 * rows, 14 * columns, 3), np.uint8)).save(buffer, "png")
    color, shape = rng.choice(COLORS), rng.choice(SHAPES)
    return {
        "key": f"r{index}",
        "images": [buffer.getvalue()],
        "captions": [f"a {rng.choice(('small', 'large'))} {color} {shape}", f"{color} {shape}"],
        "questions": [
            {"id": f"{index}a", "question": f"What color is the {shape}?", "answer": str(color)},
            {"id": f"{index}b", "question": "What color is it?", "answer": str(rng.choice(COLORS))},
        ],
    }


def config(method: str = "pretrain", **sections):
    """A config of this model with random weights, everything small; `sections`: {section: {key: value}} to change."""
    made = schema.default(method)
    made.model.update(path=str(directory()), init="random", remat="none")
    made.data.update(image_patches=32, groups=8)
    # Adam divides by the gradient's own size: with the usual epsilon a gradient of rounding errors moves a weight as
    # far as any other, and no two orders of summation would agree.
    made.train.update(steps=5, batch_size=16, learning_rate=1e-3, warmup=0.2, epsilon=1e-4)
    if method == "pretrain":
        made.latent.update(grid=2, statistics_examples=8)
    made.log.update(progress=False, tensorboard=False)
    for name, values in sections.items():
        made[name].update(values)
    return schema.resolve(made)


def batches(config, count: int, micro: int = 1) -> list[packing.Batch]:
    """Steps of `micro` micro-steps and eight groups over all of them: sixteen examples, the replay share among them."""
    packer = packing.Packer(
        packing.BatchShape(
            micro=micro,
            groups=8 // micro,
            rows=1,
            tokens=64,
            patches=48,
            examples=2,
            slots=0,
            channels=3 * 14 * 14,
            image_patches=32,
        ).with_room(pretrain.room(config))
    )
    examples = (processor().lay_out(pretrain.layout(record(i), i, config, processor())) for i in itertools.count())
    finished = (batch for batch in map(packer.add, examples) if batch is not None)
    return list(itertools.islice(finished, count))
