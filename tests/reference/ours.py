"""Our whole path: messages -> processor -> rows or packed rows -> model, loaded from the checkpoint directory."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from latent_jax.data.chat import Processor
from latent_jax.data.layout import Example
from latent_jax.data.prompt_batch import one_per_row
from latent_jax.models import hf_io
from latent_jax.models.parameters import Structure
from latent_jax.models.qwen2_5_vl.config import ModelConfig, from_json
from latent_jax.models.qwen2_5_vl.model import Qwen2_5_VL


@dataclasses.dataclass(frozen=True)
class Loaded:
    processor: Processor
    config: ModelConfig
    structure: Structure
    arrays: dict[str, jax.Array]

    @property
    def model(self) -> Qwen2_5_VL:
        return self.structure.build(self.arrays)


@functools.cache
def load(directory: Path) -> Loaded:
    config = from_json(directory / "config.json")
    structure = Structure.of(nnx.eval_shape(lambda: Qwen2_5_VL(config, rngs=nnx.Rngs(0))))
    return Loaded(Processor.from_directory(directory), config, structure, hf_io.load(directory, config))


def examples(loaded: Loaded, conversations, add_generation_prompt=True) -> list[Example]:
    return [
        loaded.processor.lay_out(loaded.processor.render(messages, add_generation_prompt)) for messages in conversations
    ]


def on_device(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    return {key: jnp.asarray(value) for key, value in batch.items()}


# Programs here run once or twice: what counts is how long they compile.
QUICK = {"xla_backend_optimization_level": 0}


def forward(model: Qwen2_5_VL, batch: dict[str, jax.Array], image_patches: int) -> jax.Array:
    """(G, B, T, V) of a batch."""
    merged = model.encode(batch, image_patches=image_patches)[0] if "patches" in batch else None
    hidden, _ = model.decode(model.embed(batch["tokens"], batch["feature_index"], merged), batch)
    return model.logits(hidden)


packed_logits = jax.jit(forward, static_argnames="image_patches", compiler_options=QUICK)


def logits(loaded: Loaded, conversations) -> list[np.ndarray]:
    """(t, V) of every conversation."""
    made = one_per_row(examples(loaded, conversations), loaded.config)
    found = np.asarray(packed_logits(loaded.model, on_device(made.batch), made.image_patches))[0]
    return [row[:length] for row, length in zip(found, made.lengths, strict=True)]
