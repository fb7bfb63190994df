"""Cross-entropy over a large vocabulary without ever holding the (X, V) logits.

The loss is linear in its cotangent, so the forward pass of a differentiated call already forms both gradients, chunk by
chunk, while the logits are at hand: three matmuls in all and nothing recomputed. A call that is not differentiated
forms none.

On a mesh every device works through its own tokens, chunk by chunk, with the weight whole over `fsdp` (gathered once)
and its vocabulary split over `tp`; the weight's gradient is summed over devices once, behind the last chunk.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from latent_jax.ops import partition

# Elements of one chunk's logits. In float32 1 GiB: large enough that reading the weight and adding to its gradient once
# a chunk is a small part of the chunk's matmuls, small beside the activations of the training step that it ends.
LOGITS_BUDGET = 2**28


def chunked_cross_entropy(
    hidden: Float[Array, "X D"],
    weight: Float[Array, "V D"],
    targets: Int[Array, " X"],
    loss_weights: Float[Array, " X"],
    *,
    chunk: int | None = None,
    capacity: int | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """Sum of w * CE, sum of w, and sum of w * (the target is the argmax), over X tokens, in nats.

    hidden: any float dtype; the matmuls run in it (weight is cast to it) and accumulate in float32, or float64 if
        hidden is float64. Softmax and sums are in that accumulator's dtype, and so are the results.
    targets: ids in [0, V). Where loss_weights is 0 neither the target nor the hidden state is looked at: they may hold
        anything, NaN too, and get a zero gradient.
    chunk: most tokens whose logits are held at once; None takes as many as LOGITS_BUDGET allows for V. It changes
        memory and the order of summation only. On a mesh it counts each device's own tokens.
    capacity: at most this many tokens have a non-zero weight, and only these are computed. The caller guarantees it;
        were it broken, the first sum is NaN rather than silently too small. The gather is over the X given: X must
        not be sharded.

    Gradients are exact for hidden, weight and loss_weights; the argmax is piecewise constant.
    """
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    loss_weights = loss_weights.astype(dtype)
    weight_sum = loss_weights.sum()
    overflow = jnp.zeros((), dtype)
    if capacity is not None and capacity < hidden.shape[0]:
        kept = jnp.argsort(loss_weights == 0, stable=True)[:capacity]
        overflow = jnp.where(jnp.count_nonzero(loss_weights) > capacity, jnp.nan, overflow)
        hidden, targets, loss_weights = hidden[kept], targets[kept], loss_weights[kept]
    # 0 * NaN is NaN: an unsupervised row must be cleared before it meets the sum over tokens in the weight's gradient.
    hidden = jnp.where(loss_weights[:, None] != 0, hidden, 0)
    chunk = chunk or max(1, LOGITS_BUDGET // weight.shape[0])
    total, correct = _weighted_sums(hidden, weight.astype(hidden.dtype), targets, loss_weights, chunk)
    return total + overflow, weight_sum, correct


def _chunk_count(tokens: int, chunk: int) -> int:
    """Fewest chunks of at most `chunk` tokens; up to twice as many where that makes them equal and spares padding."""
    fewest = max(1, -(-tokens // chunk))
    return next((n for n in range(fewest, 2 * fewest) if tokens % n == 0), fewest)


def _split(tokens: Array, chunks: int) -> Array:
    """(X, ...) to (chunks, ceil(X / chunks), ...); zeros (weight 0) fill the last chunk."""
    padding = [(0, -tokens.shape[0] % chunks)] + [(0, 0)] * (tokens.ndim - 1)
    return jnp.pad(tokens, padding).reshape(chunks, -1, *tokens.shape[1:])


def _logits(hidden: Array, weight: Array) -> Array:
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    return jnp.einsum("XD,VD->XV", hidden, weight, preferred_element_type=dtype)


def _score(logits: Array, targets: Array) -> tuple[Array, Array, Array, Array]:
    """Cross-entropy and whether the target is the (first) argmax, a token; log-normaliser; the one-hot targets.

    Only elementwise work and reductions over V: no gather along a vocabulary that may be sharded, and no argmax, which
    XLA does not vectorise on CPU.
    """
    vocabulary = lax.broadcasted_iota(targets.dtype, (1, logits.shape[1]), 1)
    one_hot = vocabulary == targets[:, None]
    largest = logits.max(axis=1)
    log_normaliser = largest + jnp.log(jnp.exp(logits - largest[:, None]).sum(axis=1))
    target_logit = jnp.where(one_hot, logits, 0).sum(axis=1)
    loses = (logits < target_logit[:, None]) | ((logits == target_logit[:, None]) & (vocabulary >= targets[:, None]))
    return log_normaliser - target_logit, loses.all(axis=1).astype(logits.dtype), log_normaliser, one_hot


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _weighted_sums(
    hidden: Array, weight: Array, targets: Array, loss_weights: Array, chunk: int
) -> tuple[Array, Array]:
    """(X, D), (V, D), (X,), (X,) -> the weighted sums of cross-entropy and of correctness."""

    def local(
        axes: tuple[str, ...], hidden: Array, weight: Array, targets: Array, loss_weights: Array
    ) -> tuple[Array, ...]:
        def step(carry: None, inputs: tuple[Array, ...]) -> tuple[None, tuple[Array, Array]]:
            hidden, targets, loss_weights = inputs
            loss, correct, _, _ = _score(_logits(hidden, weight), targets)
            return carry, (loss_weights @ loss, loss_weights @ correct)

        weight = _whole(weight, hidden, axes)
        chunks = _chunk_count(hidden.shape[0], chunk)
        inputs = tuple(_split(x, chunks) for x in (hidden, targets, loss_weights))
        _, sums = lax.scan(step, None, inputs, unroll=chunks == 1)
        return tuple(_add(x.sum(), axes) for x in sums)

    return _on_mesh(local, hidden, weight, (P(), P()))(hidden, weight, targets, loss_weights)


def _weighted_sums_forward(
    hidden: Array, weight: Array, targets: Array, loss_weights: Array, chunk: int
) -> tuple[tuple[Array, Array], tuple[Array, Array, Array, Array]]:
    dtype = loss_weights.dtype

    def local(
        axes: tuple[str, ...], hidden: Array, weight: Array, targets: Array, loss_weights: Array
    ) -> tuple[Array, ...]:
        def step(weight_gradient: Array, inputs: tuple[Array, ...]) -> tuple[Array, tuple[Array, Array, Array]]:
            hidden, targets, loss_weights = inputs
            logits = _logits(hidden, weight)
            loss, correct, log_normaliser, one_hot = _score(logits, targets)
            error = (jnp.exp(logits - log_normaliser[:, None]) - one_hot) * loss_weights[:, None]
            error = error.astype(hidden.dtype)
            hidden_gradient = jnp.einsum("XV,VD->XD", error, weight, preferred_element_type=dtype)
            weight_gradient += jnp.einsum("XV,XD->VD", error, hidden, preferred_element_type=dtype)
            return weight_gradient, (loss, correct, hidden_gradient.astype(hidden.dtype))

        tokens, stored = hidden.shape[0], weight.shape
        weight = _whole(weight, hidden, axes)
        chunks = _chunk_count(tokens, chunk)
        inputs = tuple(_split(x, chunks) for x in (hidden, targets, loss_weights))
        start = jnp.zeros_like(weight, dtype)
        weight_gradient, parts = lax.scan(step, start, inputs, unroll=chunks == 1)
        loss, correct, hidden_gradient = (x.reshape(-1, *x.shape[2:])[:tokens] for x in parts)
        sums = _add((loss_weights * loss).sum(), axes), _add((loss_weights * correct).sum(), axes)
        weight_gradient = _back(weight_gradient, stored, axes).astype(weight.dtype)
        return (*sums, hidden_gradient, weight_gradient, loss, correct)

    tokens, table = _specs(hidden, weight)
    run = _on_mesh(local, hidden, weight, (P(), P(), tokens, table, tokens, tokens))
    total, right, hidden_gradient, weight_gradient, loss, correct = run(hidden, weight, targets, loss_weights)
    return (total, right), (hidden_gradient, weight_gradient, loss, correct)


def _weighted_sums_backward(
    _: int, residuals: tuple[Array, Array, Array, Array], cotangents: tuple[Array, Array]
) -> tuple[Array, Array, None, Array]:
    hidden_gradient, weight_gradient, loss, correct = residuals
    total, correct_total = cotangents
    return (
        (total * hidden_gradient).astype(hidden_gradient.dtype),
        (total * weight_gradient).astype(weight_gradient.dtype),
        None,
        total * loss + correct_total * correct,
    )


_weighted_sums.defvjp(_weighted_sums_forward, _weighted_sums_backward)


# ---------------------------------------------------------------- on a mesh


def _specs(hidden: Array, weight: Array) -> tuple[P, P]:
    """How the tokens and the (V, D) table lie over replica and fsdp; `tp` is the partitioner's to follow."""
    mesh = partition.ambient()
    if mesh is None or hidden.shape[0] % partition.groups(mesh):
        return P(), P()
    return P(partition.GROUPS), P(None, "fsdp") if weight.shape[1] % mesh.shape["fsdp"] == 0 else P()


def _on_mesh(local: Callable, hidden: Array, weight: Array, out_specs: tuple[P, ...]) -> Callable:
    """`local(axes, hidden, weight, targets, loss_weights)` over every device's own tokens; axes () = all are here."""
    tokens, table = _specs(hidden, weight)
    if tokens == P():
        return functools.partial(local, ())
    return jax.shard_map(
        functools.partial(local, partition.GROUPS),
        mesh=partition.ambient(),
        in_specs=(tokens, table, tokens, tokens),
        out_specs=out_specs,
        axis_names=set(partition.GROUPS),
        check_vma=False,
    )


def _whole(weight: Array, hidden: Array, axes: tuple[str, ...]) -> Array:
    """The table with all of D, as the hidden states have it."""
    parts = axes and weight.shape[1] < hidden.shape[1]
    return lax.all_gather(weight, "fsdp", axis=1, tiled=True) if parts else weight


def _back(gradient: Array, stored: tuple[int, ...], axes: tuple[str, ...]) -> Array:
    """The gradient summed over devices, in the part of D that this device keeps."""
    if not axes or stored == gradient.shape:
        return _add(gradient, axes)
    # Scattered along its leading axis: TPUs turn a scatter along the last one, cut inside a tile, into an all-reduce.
    return lax.psum(lax.psum_scatter(gradient.T, "fsdp", scatter_dimension=0, tiled=True).T, "replica")


def _add(x: Array, axes: tuple[str, ...]) -> Array:
    return lax.psum(x, axes) if axes else x
