"""The embedded dataset: a procedural world with ground truth, written in the official forms of COCO and GQA."""

from latent_jax.data.scenes.write import SIZES, VERSION, write

__all__ = ["SIZES", "VERSION", "write"]
