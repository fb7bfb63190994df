"""A small model that imagines, with random statistics, and the conversations that ask it to."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from latent_jax.inference.vlm import VLM
from latent_jax.methods import imagine
from latent_jax.models.parameters import Structure
from latent_jax.training.state import new_model
from tests.reference import small

GRID = 2


@functools.cache
def facade() -> VLM:
    config = small.config("imagine", latent=dict(grid=GRID))
    make = lambda: new_model(config, imagine.METHOD, small.model_config())  # noqa: E731
    structure = Structure.of(nnx.eval_shape(make))
    arrays = jax.jit(lambda: structure.arrays(make()))()
    rng = np.random.default_rng(0)
    arrays["head.mean"] = jnp.asarray(rng.normal(size=64), jnp.float32)
    arrays["head.scale"] = jnp.full(64, 0.5, jnp.float32)
    return VLM(structure.build(arrays), small.processor(), config, (574,), "small")


def picture(index: int) -> dict:
    return {"type": "image", "image": small.record(index)["images"][0]}


def user(*content) -> list[dict]:
    return [{"role": "user", "content": [{"type": "text", "text": c} if isinstance(c, str) else c for c in content]}]


SILENT = {"type": "imagine"}
