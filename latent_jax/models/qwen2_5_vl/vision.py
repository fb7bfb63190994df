"""The vision tower: patches to merged visual tokens (HF Qwen2_5_VisionTransformerPretrainedModel)."""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt8

from latent_jax.models.parameters import Declare
from latent_jax.models.qwen2_5_vl.config import VisionConfig
from latent_jax.models.qwen2_5_vl.rope import axial, rotate
from latent_jax.models.remat import rematerialise
from latent_jax.ops import partition
from latent_jax.ops.attention import block_attention
from latent_jax.ops.norm import rms_norm

EPS = 1e-6


class VisionBlock(nnx.Module):
    """One block (HF Qwen2_5_VLVisionBlock); its weights carry a leading L and are sliced by the scan."""

    def __init__(self, config: VisionConfig, rngs: nnx.Rngs, dtype: DTypeLike):
        sizes = dict(L=config.depth, D=config.hidden_size, N=config.num_heads, H=config.head_size)
        declare = Declare(sizes | dict(F=config.intermediate_size), rngs, dtype)
        depth = (2 * config.depth) ** -0.5
        self.norm1 = declare.constant("L D", 1.0)
        self.qkv = declare.normal("L D 3 N H", "D")
        self.qkv_bias = declare.constant("L 3 N H")
        self.proj = declare.normal("L N H D", "D", depth)
        self.proj_bias = declare.constant("L D")
        self.norm2 = declare.constant("L D", 1.0)
        self.gate = declare.normal("L D F", "D")
        self.gate_bias = declare.constant("L F")
        self.up = declare.normal("L D F", "D")
        self.up_bias = declare.constant("L F")
        self.down = declare.normal("L F D", "F", depth)
        self.down_bias = declare.constant("L D")

    def __call__(
        self,
        x: Float[Array, "G P D"],
        angles: Float[Array, "G P I"],
        ids: Int[Array, "G P"],
        block: int,
        attention: str = "reference",
    ) -> Float[Array, "G P D"]:
        with jax.named_scope("attention"):
            qkv = jnp.einsum("GPD,D...NH->...GPNH", rms_norm(x, self.norm1[...], EPS), self.qkv[...])
            q, k, v = qkv + self.qkv_bias[...][:, None, None]
            x = x + self.project(block_attention(rotate(q, angles), rotate(k, angles), v, ids, block, attention))
        with jax.named_scope("mlp"):
            y = rms_norm(x, self.norm2[...], EPS)
            gate = jax.nn.silu(jnp.einsum("GPD,DF->GPF", y, self.gate[...]) + self.gate_bias[...])
            up = jnp.einsum("GPD,DF->GPF", y, self.up[...]) + self.up_bias[...]
            return x + jnp.einsum("GPF,FD->GPD", gate * up, self.down[...]) + self.down_bias[...]

    def project(self, heads: Float[Array, "G P N H"]) -> Float[Array, "G P D"]:
        return jnp.einsum("GPNH,NHD->GPD", heads, self.proj[...]) + self.proj_bias[...]


class Merger(nnx.Module):
    """merge^2 neighbouring patches to one token of the language model's width (HF Qwen2_5_VLPatchMerger).

    C = merge^2 * D: width of the joined patches. X = C: inner width. O: width of the language model.
    """

    def __init__(self, config: VisionConfig, rngs: nnx.Rngs, dtype: DTypeLike):
        sizes = dict(D=config.hidden_size, C=config.hidden_size * config.merge_unit, O=config.out_hidden_size)
        declare = Declare(sizes, rngs, dtype)
        self.norm = declare.constant("D", 1.0)
        self.fc1 = declare.normal("C C", "C")
        self.fc1_bias = declare.constant("C")
        self.fc2 = declare.normal("C O", "C")
        self.fc2_bias = declare.constant("O")

    def __call__(self, x: Float[Array, "G P D"]) -> Float[Array, "G M O"]:
        G, P, D = x.shape
        x = rms_norm(x, self.norm[...], EPS).reshape(G, P * D // self.fc1.shape[0], self.fc1.shape[0])
        x = jax.nn.gelu(jnp.einsum("GMC,CX->GMX", x, self.fc1[...]) + self.fc1_bias[...], approximate=False)
        return jnp.einsum("GMX,XO->GMO", x, self.fc2[...]) + self.fc2_bias[...]


class VisionTower(nnx.Module):
    """Patches in window-major order to merged tokens in the same order; nothing is sorted on the device."""

    attention = "reference"  # see ops.attention

    def __init__(self, config: VisionConfig, rngs: nnx.Rngs, dtype: DTypeLike):
        self.config = config
        channels = config.in_channels * config.patch_size**2
        sizes = dict(f=config.temporal_patch_size, c=channels, D=config.hidden_size)
        self.patch = Declare(sizes, rngs, dtype).normal("f c D", "f c")
        self.blocks = VisionBlock(config, rngs, dtype)
        self.merger = Merger(config, rngs, dtype)

    def __call__(
        self,
        patches: UInt8[Array, "G P c"],
        patch_positions: Int[Array, "G P 2"],
        patch_window: Int[Array, "G P"],
        patch_image: Int[Array, "G P"],
        *,
        image_patches: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        remat: str = "none",
        unroll: int = 1,
        collect: bool = False,
    ) -> tuple[Float[Array, "G M O"], Float[Array, "G P D"], Float[Array, "L G P D"] | None]:
        """Encodes packed images.

        Args:
          patches: uint8 pixels; c = frames * 3 * patch_size^2 in the order (channel, frame, row, column), with one
            frame for stills or temporal_patch_size for video.
          patch_positions: row and column of each patch in its image.
          patch_window, patch_image: attention groups of the windowed and of the full blocks; 0 = padding.
          image_patches: the most patches of one image (static): the block size of full attention.
          mean, std: normalisation of the three channels, pixels scaled to [0, 1].
          remat, unroll: what the backward pass recomputes, and how many layers a turn of the loop holds.
          collect: also return every block's output.

        Returns:
          (merged tokens, patch features before the merger, block outputs or None).
        """
        x = partition.rows(self.embed(patches, mean, std))
        angles = axial(patch_positions, self.config.head_size)
        windowed = max(self.config.window_patches, self.config.merge_unit)

        full = set(self.config.fullatt_block_indexes)
        repeats, runs = _pattern([layer in full for layer in range(self.config.depth)])

        def blocks_of(is_full: bool) -> Callable[[Array, VisionBlock], tuple[Array, Array | None]]:
            group = (patch_image, image_patches) if is_full else (patch_window, windowed)

            def body(x: Array, block: VisionBlock) -> tuple[Array, Array | None]:
                x = partition.rows(partition.gather_module(block)(x, angles, *group, self.attention))
                return x, (x if collect else None)

            return rematerialise(body, remat, looped=repeats > 1)

        bodies = {is_full: blocks_of(is_full) for is_full in (False, True)}

        def turn(x: Array, blocks: VisionBlock) -> tuple[Array, Array | None]:
            layers: list[Array] = []
            start = 0
            for is_full, count in runs:
                some = jax.tree.map(lambda weight: weight[start : start + count], blocks)  # noqa: B023
                x, outputs = jax.lax.scan(bodies[is_full], x, some, unroll=min(unroll, count))
                if outputs is not None:
                    layers.append(outputs)
                start += count
            return x, (jnp.concatenate(layers) if collect else None)

        period = self.config.depth // repeats
        turns = jax.tree.map(lambda weight: weight.reshape(repeats, period, *weight.shape[1:]), self.blocks)
        x, layers = jax.lax.scan(turn, x, turns, unroll=min(max(unroll // period, 1), repeats))
        return self.merger(x), x, None if layers is None else layers.reshape(self.config.depth, *x.shape)

    def embed(
        self, patches: UInt8[Array, "G P c"], mean: tuple[float, ...], std: tuple[float, ...]
    ) -> Float[Array, "G P D"]:
        """Normalises and projects. A still shows every temporal kernel the same frame: their sum is applied once."""
        G, P, c = patches.shape
        kernel = self.patch[...]
        f, per_frame, D = kernel.shape
        channels = len(mean)
        frames = c // per_frame
        pixels = patches.reshape(G, P, channels, -1).astype(jnp.float32)
        pixels = (pixels / 255 - jnp.array(mean)[:, None]) / jnp.array(std)[:, None]
        if frames == 1:
            kernel = kernel.astype(jnp.float32).sum(0).astype(kernel.dtype)
        else:
            kernel = kernel.reshape(f, channels, -1, D).swapaxes(0, 1).reshape(c, D)
        return jnp.einsum("GPc,cD->GPD", pixels.reshape(G, P, c).astype(kernel.dtype), kernel)


def _pattern(kinds: list[bool]) -> tuple[int, list[tuple[bool, int]]]:
    """How often the layers repeat their shortest pattern, and that pattern as runs of (kind, layers).

    Which attention a layer has is thus known when the program is made: a conditional in one scan over all layers would
    keep both kinds' intermediate values for the backward pass, the ones not computed as zeros.
    """
    depth = len(kinds)
    period = next(p for p in range(1, depth + 1) if depth % p == 0 and kinds == kinds[:p] * (depth // p))
    return depth // period, [(kind, len(list(run))) for kind, run in itertools.groupby(kinds[:period])]
