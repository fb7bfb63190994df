"""Cross-entropy over a large vocabulary without ever holding the (T, V) logits.

The loss is linear in its cotangent, so the forward pass of a differentiated call already forms both gradients, chunk by
chunk, while the logits are at hand: three matmuls in all and nothing recomputed. A call that is not differentiated
forms none.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

# Elements of one chunk's logits. In float32 1 GiB: large enough that reading the weight and adding to its gradient once
# a chunk is a small part of the chunk's matmuls, small beside the activations of the training step that it ends.
LOGITS_BUDGET = 2**28


def chunked_cross_entropy(
    hidden: Float[Array, "T D"],
    weight: Float[Array, "V D"],
    targets: Int[Array, " T"],
    loss_weights: Float[Array, " T"],
    *,
    chunk: int | None = None,
    capacity: int | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """Sum of w * CE, sum of w, and sum of w * (the target is the argmax), over T tokens, in nats.

    hidden: any float dtype; the matmuls run in it (weight is cast to it) and accumulate in float32, or float64 if
        hidden is float64. Softmax and sums are in that accumulator's dtype, and so are the results.
    targets: ids in [0, V). Where loss_weights is 0 neither the target nor the hidden state is looked at: they may hold
        anything, NaN too, and get a zero gradient.
    chunk: most tokens whose logits are held at once; None takes as many as LOGITS_BUDGET allows for V. It changes
        memory and the order of summation only. Chunks are strided (chunk i of n holds tokens i, i + n, ...), so that
        where T is sharded every device has its part of every chunk.
    capacity: at most this many tokens have a non-zero weight, and only these are computed. The caller guarantees it;
        were it broken, the first sum is NaN rather than silently too small. The gather is over the T given: T must
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
    chunks = _chunk_count(hidden.shape[0], chunk or max(1, LOGITS_BUDGET // weight.shape[0]))
    total, correct = _weighted_sums(
        _split(hidden, chunks), weight.astype(hidden.dtype), _split(targets, chunks), _split(loss_weights, chunks)
    )
    return total + overflow, weight_sum, correct


def _chunk_count(tokens: int, chunk: int) -> int:
    """Fewest chunks of at most `chunk` tokens; up to twice as many where that makes them equal and spares padding."""
    fewest = max(1, -(-tokens // chunk))
    return next((n for n in range(fewest, 2 * fewest) if tokens % n == 0), fewest)


def _split(tokens: Array, chunks: int) -> Array:
    """(T, ...) to (chunks, ceil(T / chunks), ...), strided; zeros (weight 0) fill the last of each chunk."""
    padding = [(0, -tokens.shape[0] % chunks)] + [(0, 0)] * (tokens.ndim - 1)
    return jnp.swapaxes(jnp.pad(tokens, padding).reshape(-1, chunks, *tokens.shape[1:]), 0, 1)


def _logits(hidden: Array, weight: Array) -> Array:
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    return jnp.einsum("td,vd->tv", hidden, weight, preferred_element_type=dtype)


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


@jax.custom_vjp
def _weighted_sums(hidden: Array, weight: Array, targets: Array, loss_weights: Array) -> tuple[Array, Array]:
    """(n, c, D), (V, D), (n, c), (n, c) -> the weighted sums of cross-entropy and of correctness."""

    def step(_, inputs):
        hidden, targets, loss_weights = inputs
        loss, correct, _, _ = _score(_logits(hidden, weight), targets)
        return None, (loss_weights @ loss, loss_weights @ correct)

    _, (totals, corrects) = lax.scan(step, None, (hidden, targets, loss_weights), unroll=hidden.shape[0] == 1)
    return totals.sum(), corrects.sum()


def _weighted_sums_forward(hidden: Array, weight: Array, targets: Array, loss_weights: Array):
    dtype = loss_weights.dtype

    def step(weight_gradient, inputs):
        hidden, targets, loss_weights = inputs
        logits = _logits(hidden, weight)
        loss, correct, log_normaliser, one_hot = _score(logits, targets)
        error = (jnp.exp(logits - log_normaliser[:, None]) - one_hot) * loss_weights[:, None]
        error = error.astype(hidden.dtype)
        hidden_gradient = jnp.einsum("tv,vd->td", error, weight, preferred_element_type=dtype).astype(hidden.dtype)
        weight_gradient += jnp.einsum("tv,td->vd", error, hidden, preferred_element_type=dtype)
        return weight_gradient, (loss, correct, hidden_gradient)

    weight_gradient, (loss, correct, hidden_gradient) = lax.scan(
        step, jnp.zeros_like(weight, dtype), (hidden, targets, loss_weights), unroll=hidden.shape[0] == 1
    )
    sums = (loss_weights * loss).sum(), (loss_weights * correct).sum()
    return sums, (hidden_gradient, weight_gradient.astype(weight.dtype), loss, correct)


def _weighted_sums_backward(residuals, cotangents):
    hidden_gradient, weight_gradient, loss, correct = residuals
    total, correct_total = cotangents
    return (
        (total * hidden_gradient).astype(hidden_gradient.dtype),
        (total * weight_gradient).astype(weight_gradient.dtype),
        None,
        total * loss + correct_total * correct,
    )


_weighted_sums.defvjp(_weighted_sums_forward, _weighted_sums_backward)
