"""Attention kernels that never hold the scores: cuDNN's on GPUs, splash attention on TPUs.

Both know less than our rule of segments and views (a query sees the trunk of its segment and its own view), which is no
equality of ids. So a row's mask is handed over densely, T x T: to cuDNN as a bias in the queries' dtype, to splash as a
*dynamic* block mask of bytes. That is exact for any layout, repeats no trunk, needs no word from the method on whether
its rows have views, and lets splash skip every block of two segments that do not see each other, which its own
SegmentIds do not. It costs 2 T^2 bytes a row either way: 32 MiB at 4k tokens, for the one layer that is computed.

The vision tower's runs are equalities of ids in a band: on TPUs SegmentIds within a static LocalMask, on GPUs blocks of
queries against their three blocks of keys (`attention.block_attention`).
"""

import functools
import math
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from latent_jax.ops import partition

# Queries and keys of a splash block: as large as a core's vector memory takes with room for the pipeline.
SPLASH_BLOCK, LANES = 512, 128


# ---------------------------------------------------------------- GPU


def cudnn(
    q: Float[Array, "R T N H"],
    k: Float[Array, "R U K H"],
    v: Float[Array, "R U K H"],
    mask: Bool[Array, "R 1 T U"],
    kernel: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "R T N H"]:
    """`attention` by cuDNN's fused kernels; bfloat16 or float16. `kernel` "xla" goes the same way on any platform."""
    T, U = mask.shape[2:]

    def local(q: Array, k: Array, v: Array, mask: Array) -> Array:
        # Its backward pass takes even lengths only.
        q, k, v = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (q, k, v))
        mask = _padded(mask, T % 2, U % 2)
        return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=kernel)[:, :T]

    return _on_mesh(local, q, k, v, mask)


def cudnn_obstacle(platform: str, dtype: DTypeLike, head_sizes: Iterable[int]) -> str:
    """Why cuDNN's attention cannot run there, or "" where it can."""
    if platform != "gpu":
        return f"cudnn runs on NVIDIA GPUs, and the mesh is of platform {platform}"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"cudnn computes in bfloat16 or float16, and the model in {jnp.dtype(dtype).name}"
    for size in head_sizes:
        if size % 8 or size > 128:
            return f"cudnn takes head sizes that are multiples of 8 up to 128, and a head of the model has {size}"
    if not cudnn_installed():
        return "cuDNN is not installed (it comes with the extras cuda12 and cuda13)"
    return ""


@functools.cache
def cudnn_installed() -> bool:
    """Whether jax finds the cuDNN library, which it asks for its version before it compiles anything."""
    try:
        from jax._src.cudnn.fused_attention_stablehlo import check_cudnn_version

        return bool(check_cudnn_version())
    except (ImportError, RuntimeError):
        return False


# ---------------------------------------------------------------- TPU


def splash(
    q: Float[Array, "R T N H"],
    k: Float[Array, "R U K H"],
    v: Float[Array, "R U K H"],
    mask: Bool[Array, "R 1 T U"],
    interpret: bool = False,
) -> Float[Array, "R T N H"]:
    """`attention` by splash attention with a dynamic mask; `interpret` runs the kernel's own steps on any platform."""
    T, U = mask.shape[2:]

    def row(q: Array, k: Array, v: Array, mask: Array) -> Array:
        kernel = _kernels().make_splash_mha(
            mask,
            block_sizes=_block_sizes(q.shape[1], k.shape[1], SPLASH_BLOCK),
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )
        # Built under a trace, it has made an array of this flag, and then branches on it.
        kernel.fwd_mask_info = kernel.fwd_mask_info._replace(is_dynamic_mask=True)
        return kernel(q, k, v)

    def local(q: Array, k: Array, v: Array, mask: Array) -> Array:
        q, k, v = _heads_first(q * q.shape[-1] ** -0.5), _heads_first(k), _heads_first(v)
        out = jax.vmap(row)(q, k, v, _padded(mask, -T % LANES, -U % LANES))
        return jnp.swapaxes(out, 1, 2)[:, :T]

    return _on_mesh(local, q, k, v, mask)


def splash_runs(
    q: Float[Array, "G P N H"],
    k: Float[Array, "G P N H"],
    v: Float[Array, "G P N H"],
    ids: Int[Array, "G P"],
    block: int,
    interpret: bool = False,
) -> Float[Array, "G P N H"]:
    """`block_attention` by splash attention: patches of one run stand less than `block` apart."""
    length = q.shape[1]

    def local(q: Array, k: Array, v: Array, ids: Array) -> Array:
        kernels = _kernels()
        N, padded = q.shape[2], length + -length % LANES
        near = kernels.LocalMask((padded, padded), (block - 1, block - 1), 0)
        kernel = kernels.make_splash_mha(
            kernels.MultiHeadMask([near] * N),
            block_sizes=_block_sizes(padded, padded, max(LANES, min(SPLASH_BLOCK, block))),
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )
        q, k, v = _heads_first(q * q.shape[-1] ** -0.5), _heads_first(k), _heads_first(v)
        ids = jnp.pad(ids, ((0, 0), (0, -length % LANES)), constant_values=-1)
        out = jax.vmap(kernel)(q, k, v, kernels.SegmentIds(ids, ids))
        return jnp.swapaxes(out, 1, 2)[:, :length]

    return _on_mesh(local, q, k, v, ids)


def _kernels() -> ModuleType:
    # Imported where it is used: pallas is a second's import that no CPU or GPU run needs.
    from jax.experimental.pallas.ops.tpu import splash_attention

    return splash_attention


def _block_sizes(queries: int, keys: int, largest: int) -> Any:
    """The largest blocks that divide both padded lengths, for the forward and both backward kernels."""
    bq, bkv = (max(b for b in range(LANES, largest + 1, LANES) if length % b == 0) for length in (queries, keys))
    forward = dict(block_q=bq, block_kv=bkv, block_kv_compute=bkv)
    backward = dict(block_q_dkv=bq, block_kv_dkv=bkv, block_kv_dkv_compute=bkv, block_q_dq=bq, block_kv_dq=bkv)
    return _kernels().BlockSizes(**forward, **backward)


def _heads_first(x: Array) -> Array:
    """(R, T, N, H) to (R, N, T, H), T padded to whole lanes."""
    return jnp.swapaxes(jnp.pad(x, ((0, 0), (0, -x.shape[1] % LANES), (0, 0), (0, 0))), 1, 2)


# ---------------------------------------------------------------- both


def _padded(mask: Array, queries: int, keys: int) -> Array:
    """The mask with more queries and keys. New queries see the first key: one that sees nothing makes NaN gradients."""
    mask = jnp.pad(mask, ((0, 0), (0, 0), (0, 0), (0, keys)))
    seen = jnp.zeros((*mask.shape[:2], queries, mask.shape[3]), bool).at[..., 0].set(True)
    return jnp.concatenate([mask, seen], axis=2) if queries else mask


def _on_mesh(local: Callable, q: Array, k: Array, v: Array, rows: Array) -> Array:
    """Runs a kernel on every device's own rows and heads: the partitioner cannot look into it.

    Key heads that tp does not divide are repeated until it does. `rows`: the mask or the ids, leading axis R.
    """
    mesh = partition.ambient()
    if mesh is None:
        return local(q, k, v, rows)
    tp = mesh.shape["tp"] if q.shape[2] % mesh.shape["tp"] == 0 else 1
    if repeats := math.lcm(k.shape[2], tp) // k.shape[2] - 1:
        k, v = (jnp.repeat(x, repeats + 1, axis=2) for x in (k, v))
    by_row = partition.GROUPS if q.shape[0] % partition.groups(mesh) == 0 else None
    heads = P(by_row, None, "tp" if tp > 1 else None)
    on_device = jax.shard_map(
        local, mesh=mesh, in_specs=(heads, heads, heads, P(by_row)), out_specs=heads, check_vma=False
    )
    return on_device(q, k, v, rows)
