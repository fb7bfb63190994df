"""The models that are measured: a checkpoint as it is, or random weights of another width."""

import dataclasses
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
from flax import nnx

from latent_jax.assets import TINY_VL
from latent_jax.data.chat import Processor
from latent_jax.errors import UserError
from latent_jax.models import hf_export, hf_io, sums
from latent_jax.models.parameters import Structure
from latent_jax.models.qwen2_5_vl.config import ModelConfig, from_json
from latent_jax.models.qwen2_5_vl.model import Qwen2_5_VL
from latent_jax.perf import timing
from latent_jax.runtime.devices import divide_cpu, keep_freed_memory
from latent_jax.training.workdir import is_workdir

HEAD = 128  # as in every published model


@contextmanager
def checkpoint(model: str, width: int, layers: int) -> Iterator[Path]:
    """The checkpoint's directory; a temporary one where a width is given."""
    if model and width:
        raise UserError("--model and --width: a checkpoint has a width of its own; expected one of the two")
    if model and is_workdir(model):
        raise UserError(f"{model}: a workdir; expected an HF checkpoint (python -m latent_jax.convert writes one)")
    if not width:
        yield hf_io.resolve(model or TINY_VL)
        return
    with tempfile.TemporaryDirectory(prefix="latent_jax_bench_") as folder:
        yield _random(Path(folder) / "model", width, layers)


def devices() -> list[jax.Device]:
    """All there are; a core of a CPU is one, since XLA computes most of a small model on one thread.

    On a CPU both sides then run under the memory allocation that training sets up.
    """
    divide_cpu(timing.cores())
    found = jax.devices()
    if found[0].platform != "cpu":
        return found
    keep_freed_memory()
    return found[: timing.cores()]


def config_of(directory: Path, processor: Processor) -> ModelConfig:
    return dataclasses.replace(
        from_json(directory / "config.json"), image_mean=processor.image.mean, image_std=processor.image.std
    )


def _random(directory: Path, width: int, layers: int) -> Path:
    """Random weights in the proportions of the 3B model (heads of 128, 8 query heads to a key head, feed-forward 5.375
    times as wide, a vision tower .625 as wide), with the tiny model's vocabulary, vision depth and tokenizer."""
    if width % (2 * HEAD) or layers < 1:
        raise UserError(f"--width={width} --layers={layers}: expected a multiple of {2 * HEAD} and at least 1")
    shape = json.loads((TINY_VL / "config.json").read_text())
    heads = width // HEAD
    shape |= dict(hidden_size=width, intermediate_size=round(width * 5.375), num_hidden_layers=layers)
    shape |= dict(num_attention_heads=heads, num_key_value_heads=max(1, heads // 8), rope_theta=1e6)
    shape |= dict(rope_scaling=dict(type="mrope", mrope_section=[16, 24, 24]))
    vision = round(width * 0.625)
    shape["vision_config"] |= dict(
        hidden_size=vision, num_heads=vision // 80, intermediate_size=round(vision * 2.672), out_hidden_size=width
    )
    hf_export.keep_origin(TINY_VL, directory)
    for name in (hf_export.ORIGIN_FILE, sums.FILE):  # neither dtypes nor bytes are those of TINY_VL
        (directory / name).unlink()
    (directory / "config.json").write_text(json.dumps(shape))
    config = from_json(directory / "config.json")
    structure = Structure.of(nnx.eval_shape(lambda: Qwen2_5_VL(config, rngs=nnx.Rngs(0))))
    arrays = jax.jit(lambda: structure.arrays(Qwen2_5_VL(config, rngs=nnx.Rngs(0))))()
    complete = directory.with_name("complete")
    hf_export.save(complete, arrays, config, source=directory)
    return complete
