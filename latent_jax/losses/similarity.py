"""Similarity of predicted to target latents, slot by slot (docs/methods.md, latent pretraining).

With z standardised (centred and scaled by the dataset's statistics) the mean of |z|^2 / Z over slots is 1, and

    |p - z|^2 / Z = (|p| - |z|)^2 / Z  +  2 (|p| |z| / Z) (1 - cos(p, z)),

so that a cosine loss weighted by |z|^2 / Z with a norm term (|p| - |z|)^2 / Z has the two halves of the squared error,
while plain 1 - cos spends itself on the many slots of small norm and leaves the norm of p undefined.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Kind = Literal["cosine", "l2", "smooth_l1", "contrastive"]

# |x| is sqrt(x.x + EPSILON^2) here: its gradient is 0 at x = 0, and that of a cosine is at most 1 / EPSILON there.
# Latents have norms near sqrt(Z), which this changes by less than float32 resolves.
EPSILON = 1e-4


def similarity(
    predicted: Float[Array, "E S Z"],
    target: Float[Array, "E S Z"],
    mask: Bool[Array, " E"] | Bool[Array, "E S"],
    *,
    kind: Kind,
    norm_weighted: bool = False,
    norm_term: float = 0.0,
    beta: float = 1.0,
    temperature: float = 0.1,
) -> tuple[Float[Array, ""], Float[Array, ""], dict[str, tuple[Array, Array]]]:
    """Sum of the slots' losses over the valid slots, and the number of these. No gradient flows to the target.

    cosine: 1 - cos(p, z).
    l2: |p - z|^2 / Z.
    smooth_l1: mean over Z of d^2 / (2 beta) where |d| < beta, else |d| - beta / 2, with d = p - z.
    contrastive: InfoNCE from predicted to target, -log softmax_j(cos(p_i, z_j) / temperature)[i] over all valid slots j
        of the batch, slots of the same example too. Memory E * E * S.
    norm_weighted: times |z|^2 / Z, which is 1 in the mean over standardised targets; the returned weight stays the
        number of valid slots, known from the batch alone. norm_term: plus norm_term * (|p| - |z|)^2 / Z. Both are for
        the kinds that know directions only, cosine and contrastive; the other two are norm-aware and ignore them.

    Masked slots are neither positives nor negatives; they may hold anything, NaN too, and get a zero gradient.
    Computed in float32 at least. Metrics are (sum, weight) pairs: `cosine`; `norm_ratio`, sum of |p| over sum of |z|;
    for contrastive `accuracy`, whether a slot's own target is the nearest.
    """
    dtype = jnp.promote_types(predicted.dtype, jnp.float32)
    valid = jnp.broadcast_to(mask if mask.ndim == 2 else mask[:, None], predicted.shape[:2])
    predicted = jnp.where(valid[..., None], predicted.astype(dtype), 0)
    target = jax.lax.stop_gradient(jnp.where(valid[..., None], target.astype(dtype), 0))
    weight = valid.sum(dtype=dtype)

    predicted_norm, target_norm = _norm(predicted), _norm(target)
    cosine = jnp.einsum("ESZ,ESZ->ES", predicted, target) / (predicted_norm * target_norm)
    norms = jnp.where(valid, predicted_norm, 0).sum(), jnp.where(valid, target_norm, 0).sum()
    metrics = {"cosine": (cosine.sum(), weight), "norm_ratio": norms}

    difference = predicted - target
    if kind == "cosine":
        loss = 1 - cosine
    elif kind == "l2":
        loss = jnp.mean(difference**2, axis=-1)
    elif kind == "smooth_l1":
        size = jnp.abs(difference)
        loss = jnp.mean(jnp.where(size < beta, difference**2 / (2 * beta), size - beta / 2), axis=-1)
    elif kind == "contrastive":
        loss, nearest = _contrastive(
            predicted / predicted_norm[..., None], target / target_norm[..., None], valid, temperature
        )
        metrics["accuracy"] = (jnp.where(valid, nearest, 0).sum(dtype=dtype), weight)
    else:
        raise ValueError(f"similarity: kind is {kind!r}; it takes cosine, l2, smooth_l1 or contrastive")
    if kind in ("cosine", "contrastive"):
        if norm_weighted:
            loss *= jnp.mean(target**2, axis=-1)
        loss += norm_term * (predicted_norm - target_norm) ** 2 / predicted.shape[-1]
    return jnp.where(valid, loss, 0).sum(), weight, metrics


def _norm(x: Float[Array, "E S Z"]) -> Float[Array, "E S"]:
    return jnp.sqrt((x**2).sum(axis=-1) + EPSILON**2)


def _contrastive(
    predicted: Float[Array, "E S Z"], target: Float[Array, "E S Z"], valid: Bool[Array, "E S"], temperature: float
) -> tuple[Float[Array, "E S"], Bool[Array, "E S"]]:
    """InfoNCE of unit vectors against all valid slots, and whether the own one is the nearest.

    One slot index at a time, all examples together (E may be sharded, S never is), and recomputed in the backward
    pass: the (E S, E S) matrix never exists.
    """
    slots = jnp.arange(predicted.shape[1])

    @jax.checkpoint
    def one_slot(inputs: tuple[Float[Array, "E Z"], Array]) -> tuple[Float[Array, " E"], Bool[Array, " E"]]:
        queries, slot = inputs
        logits = jnp.einsum("EZ,USZ->EUS", queries, target, precision="highest") / temperature
        logits = jnp.where(valid, logits, -1e30)  # finite: a row without any valid key must not become NaN
        own = jnp.einsum("EES->ES", logits)[:, slot]
        return jax.nn.logsumexp(logits, axis=(1, 2)) - own, own >= logits.max(axis=(1, 2))

    loss, nearest = jax.lax.map(one_slot, (jnp.swapaxes(predicted, 0, 1), slots))
    return loss.T, nearest.T
