"""Attention over packed rows, over runs of patches and over a key/value cache: one signature, several kernels.

`reference` is plain jax and runs everywhere; `cudnn` and `splash` (ops.flash) never hold the scores. Which one a
program uses is an argument, chosen for the devices that it is built for (`choose`), not for the machine that builds it.
"""

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from latent_jax.ops import flash

IMPLEMENTATIONS = ("reference", "cudnn", "splash")


class Choice(NamedTuple):
    """An implementation, and why it is not the platform's kernel where it is not."""

    implementation: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.implementation} ({self.reason})" if self.reason else self.implementation


def choose(platform: str, dtype: DTypeLike, head_sizes: Iterable[int]) -> Choice:
    """The fastest implementation that runs on a platform.

    platform: of the devices that the program is for: cpu, gpu or tpu.
    dtype: of queries, keys and values.
    """
    kernel = {"gpu": "cudnn", "tpu": "splash"}.get(platform, "reference")
    problem = obstacle(kernel, platform, dtype, head_sizes)
    return Choice("reference", problem) if problem else Choice(kernel)


def obstacle(implementation: str, platform: str, dtype: DTypeLike, head_sizes: Iterable[int]) -> str:
    """Why an implementation cannot run there, or "" where it can."""
    if implementation == "cudnn":
        return flash.cudnn_obstacle(platform, dtype, head_sizes)
    if implementation == "splash" and platform != "tpu":
        return f"splash runs on TPUs, and the mesh is of platform {platform}"
    return ""


def attention(
    q: Float[Array, "R T N H"],
    k: Float[Array, "R U K H"],
    v: Float[Array, "R U K H"],
    mask: Bool[Array, "R 1 T U"],
    implementation: str = "reference",
) -> Float[Array, "R T N H"]:
    """Scaled dot-product attention with N / K query heads to a key head; softmax in fp32.

    What a query that sees no key gets is not defined; every kernel agrees on all others.
    """
    kernel = {"reference": masked_attention, "cudnn": flash.cudnn, "splash": flash.splash}[implementation]
    return kernel(q, k, v, mask)


def packed_mask(
    segment_ids: Int[Array, "R T"],
    view_ids: Int[Array, "R T"],
    hidden: Bool[Array, "R T"] | None = None,
    late: Bool[Array, "R T"] | None = None,
) -> Bool[Array, "R 1 T T"]:
    """Who sees whom in a packed row: earlier keys of one's own segment whose view is 0 (the trunk) or one's own; late
    queries see no hidden key."""
    T = segment_ids.shape[1]
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    view = (view_ids[:, None, :] == 0) | (view_ids[:, :, None] == view_ids[:, None, :])
    mask = same & view & jnp.tril(jnp.ones((T, T), bool))
    if hidden is not None and late is not None:
        mask &= ~(late[:, :, None] & hidden[:, None, :])
    return mask[:, None]


def masked_attention(
    q: Float[Array, "R T N H"],
    k: Float[Array, "R U K H"],
    v: Float[Array, "R U K H"],
    mask: Bool[Array, "R 1 T U"],
) -> Float[Array, "R T N H"]:
    """The reference of `attention`.

    The N / K query heads of a key head share one axis with the tokens (X = N / K * T), so that both products are plain
    batched matmuls: on a CPU half the time of `jax.nn.dot_product_attention` in the backward pass. A query that sees no
    key gets the mean of all.
    """
    R, T, N, H = q.shape
    U, K = k.shape[1:3]
    q = jnp.transpose(q.reshape(R, T, K, N // K, H), (0, 2, 3, 1, 4)).reshape(R, K, N // K * T, H)
    k, v = (jnp.transpose(x, (0, 2, 1, 3)) for x in (k, v))
    scores = jnp.einsum("RKXH,RKUH->RKXU", q * H**-0.5, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, :, None], scores.reshape(R, K, N // K, T, U), jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype).reshape(R, K, N // K * T, U)
    out = jnp.einsum("RKXU,RKUH->RKXH", weights, v).reshape(R, K, N // K, T, H)
    return jnp.transpose(out, (0, 3, 1, 2, 4)).reshape(R, T, N, H)


def cached_attention(
    q: Float[Array, "R N H"],
    *parts: tuple[Float[Array, "R K _ H"], Float[Array, "R K _ H"], Bool[Array, "#R _"]],
) -> Float[Array, "R N H"]:
    """Attention of one token a row over the keys and values of a cache that lies in several parts, each (k, v, mask).

    A part that only ever grows at its end stands beside one that never changes: neither is copied to join the other,
    only the scores are. Numbers as in masked_attention.
    In the einsums X = N / K, the query heads of a key head; U differs from part to part.
    """
    R, N, H = q.shape
    K = parts[0][0].shape[1]
    q = q.reshape(R, K, N // K, H) * H**-0.5
    scores = [
        jnp.where(
            mask[:, None, None],
            jnp.einsum("RKXH,RKUH->RKXU", q, k, preferred_element_type=jnp.float32),
            jnp.finfo(jnp.float32).min,
        )
        for k, _, mask in parts
    ]
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(parts[0][1].dtype)
    out, start = [], 0
    for _, v, _ in parts:
        out.append(jnp.einsum("RKXU,RKUH->RKXH", weights[..., start : start + v.shape[2]], v))
        start += v.shape[2]
    return sum(out[1:], out[0]).reshape(R, N, H)


def block_attention(
    q: Float[Array, "G P N H"],
    k: Float[Array, "G P N H"],
    v: Float[Array, "G P N H"],
    ids: Int[Array, "G P"],
    block: int,
    implementation: str = "reference",
) -> Float[Array, "G P N H"]:
    """Attention inside runs of equal ids, each run contiguous and at most `block` long.

    A run of at most `block` patches starts and ends in the same or in neighbouring blocks, so that a query's keys all
    lie in the previous, its own and the next block: exact, without padding any window.
    """
    if implementation == "splash":
        return flash.splash_runs(q, k, v, ids, block)
    G, P, N, H = q.shape
    if 3 * block >= P:
        return attention(q, k, v, (ids[:, :, None] == ids[:, None, :])[:, None], implementation)
    if extra := -P % block:
        q, k, v = (jnp.pad(x, ((0, 0), (0, extra), (0, 0), (0, 0))) for x in (q, k, v))
        ids = jnp.pad(ids, ((0, 0), (0, extra)), constant_values=-1)
        return block_attention(q, k, v, ids, block, implementation)[:, :P]
    blocks = P // block

    def neighbours(x: Array, fill: int) -> Array:
        x = x.reshape(G, blocks, block, *x.shape[2:])
        edge = jnp.full_like(x[:, :1], fill)
        before = jnp.concatenate([edge, x[:, :-1]], axis=1)
        after = jnp.concatenate([x[:, 1:], edge], axis=1)
        return jnp.concatenate([before, x, after], axis=2).reshape(G * blocks, 3 * block, *x.shape[3:])

    own = ids.reshape(G * blocks, block)
    mask = own[:, :, None] == neighbours(ids, -1)[:, None, :]
    q = q.reshape(G * blocks, block, N, H)
    out = attention(q, neighbours(k, 0), neighbours(v, 0), mask[:, None], implementation)
    return out.reshape(G, P, N, H)
