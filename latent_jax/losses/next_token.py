"""Next-token cross-entropy."""

from jaxtyping import Array, Float, Int

from latent_jax.ops.cross_entropy import chunked_cross_entropy


def next_token(
    hidden: Float[Array, "R T D"],
    lm_head: Float[Array, "V D"],
    targets: Int[Array, "R T"],
    loss_weights: Float[Array, "R T"],
    *,
    chunk: int | None = None,
    capacity: int | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""], dict[str, tuple[Array, Array]]]:
    """Weighted sum of -log softmax(lm_head hidden)[target] in nats, and the sum of the weights.

    hidden: final hidden states, after the last norm. lm_head: (V, D), the token embedding where the two are tied.
    targets: the next token of each position's own view; looked at only where loss_weights is not 0.
    chunk, capacity: see chunked_cross_entropy; they count over all R * T positions.
    Metrics are (sum, weight) pairs: `accuracy`, of the argmax.
    """
    total, weight, correct = chunked_cross_entropy(
        hidden.reshape(-1, hidden.shape[-1]),
        lm_head,
        targets.reshape(-1),
        loss_weights.reshape(-1),
        chunk=chunk,
        capacity=capacity,
    )
    return total, weight, {"accuracy": (correct, weight)}
