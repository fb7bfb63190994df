"""Alignment of pooled predicted and target latents across the global batch.

Each loss returns the sum over the valid examples, their number, and metrics as (sum, weight) pairs. Masked examples are
neither positives nor negatives; they may hold anything, NaN too, and get a zero gradient. No gradient flows to the
target. Computed in float32 at least. Contrast is not additive: under accumulation each micro-step sees its own batch.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# |x| is sqrt(x.x + EPSILON^2): see losses/similarity.py.
EPSILON = 1e-4
# The largest scale of the logits (the smallest temperature is .01), as CLIP has it.
MAX_SCALE = 100.0

Result = tuple[Float[Array, ""], Float[Array, ""], dict[str, tuple[Array, Array]]]


def infonce(
    predicted: Float[Array, "E Z"],
    target: Float[Array, "E Z"],
    mask: Bool[Array, " E"],
    *,
    logit_scale: Float[Array, ""],
) -> Result:
    """Symmetric InfoNCE (CLIP, arXiv 2103.00020): the mean of the two directions' cross-entropies.

    logits_ij = exp(logit_scale) cos(p_i, z_j); logit_scale is learned, the log of the inverse temperature (CLIP starts
    at log(1 / .07)), and exp(logit_scale) is held at 100 at most. `accuracy`: nearest target of each prediction.
    """
    cosine = _cosines(_unit(predicted, mask), jax.lax.stop_gradient(_unit(target, mask)))
    weight = mask.sum(dtype=cosine.dtype)
    logits = jnp.minimum(jnp.exp(logit_scale.astype(cosine.dtype)), MAX_SCALE) * cosine
    own = jnp.diagonal(logits)
    # Finite rather than -inf, so that a batch with no valid example gives 0 and not NaN.
    rows = jax.nn.logsumexp(jnp.where(mask[None, :], logits, -1e30), axis=1) - own
    columns = jax.nn.logsumexp(jnp.where(mask[:, None], logits, -1e30), axis=0) - own
    return jnp.where(mask, rows + columns, 0).sum() / 2, weight, {"accuracy": (_nearest(cosine, mask), weight)}


def sigmoid(
    predicted: Float[Array, "E Z"],
    target: Float[Array, "E Z"],
    mask: Bool[Array, " E"],
    *,
    logit_scale: Float[Array, ""],
    logit_bias: Float[Array, ""],
) -> Result:
    """SigLIP (arXiv 2303.15343): sum over all pairs of -log sigmoid(+-(exp(logit_scale) cos + logit_bias)).

    The sign is + for i = j. Divided by the returned weight it is the paper's mean over the batch of a sum over pairs.
    logit_scale (the log; starts at log 10) and logit_bias (-10) are learned. `accuracy`: as in infonce.
    """
    cosine = _cosines(_unit(predicted, mask), jax.lax.stop_gradient(_unit(target, mask)))
    weight = mask.sum(dtype=cosine.dtype)
    logits = jnp.exp(logit_scale.astype(cosine.dtype)) * cosine + logit_bias.astype(cosine.dtype)
    loss = jax.nn.softplus(jnp.where(jnp.eye(len(mask), dtype=bool), -logits, logits))
    total = jnp.where(mask[:, None] & mask[None, :], loss, 0).sum()
    return total, weight, {"accuracy": (_nearest(cosine, mask), weight)}


def relational(predicted: Float[Array, "E Z"], target: Float[Array, "E Z"], mask: Bool[Array, " E"]) -> Result:
    """Squared difference between the batch's cosine matrices, cos(p_i, p_j) and cos(z_i, z_j), i != j.

    An example's loss is the mean over its partners, so that sum / weight is the mean over valid pairs; 0 where fewer
    than two examples are valid. Metrics: `predicted_cosine` and `target_cosine`, means over pairs (near 1: collapse).
    """
    predicted, target = _unit(predicted, mask), jax.lax.stop_gradient(_unit(target, mask))
    predicted_cosine, target_cosine = _cosines(predicted, predicted), _cosines(target, target)
    weight = mask.sum(dtype=predicted_cosine.dtype)
    pairs = mask[:, None] & mask[None, :] & ~jnp.eye(len(mask), dtype=bool)

    def mean_over_partners(values: Float[Array, "E E"]) -> Float[Array, ""]:
        return jnp.where(pairs, values, 0).sum() / jnp.maximum(weight - 1, 1)

    total = mean_over_partners((predicted_cosine - target_cosine) ** 2)
    metrics = {
        "predicted_cosine": (mean_over_partners(predicted_cosine), weight),
        "target_cosine": (mean_over_partners(target_cosine), weight),
    }
    return total, weight, metrics


def _unit(x: Float[Array, "E Z"], mask: Bool[Array, " E"]) -> Float[Array, "E Z"]:
    """Rows of length 1 in float32 or better; masked rows are 0."""
    x = jnp.where(mask[:, None], x.astype(jnp.promote_types(x.dtype, jnp.float32)), 0)
    return x / jnp.sqrt((x**2).sum(axis=-1, keepdims=True) + EPSILON**2)


def _cosines(a: Float[Array, "E Z"], b: Float[Array, "E Z"]) -> Float[Array, "E E"]:
    # "highest": a cosine rounded to TF32's or bfloat16's mantissa, times a scale of 100, would be off by a tenth.
    return jnp.einsum("EZ,UZ->EU", a, b, precision="highest")


def _nearest(cosine: Float[Array, "E E"], mask: Bool[Array, " E"]) -> Float[Array, ""]:
    """How many valid predictions have their own target as the nearest of the valid ones."""
    nearest = jnp.diagonal(cosine) >= jnp.where(mask[None, :], cosine, -jnp.inf).max(axis=1)
    return jnp.where(mask, nearest, False).sum(dtype=cosine.dtype)
