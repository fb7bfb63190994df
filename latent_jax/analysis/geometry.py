"""Geometry of predicted and target latents: have they collapsed, and do they match where it matters?

Pure numpy in float64 over latents already fetched from the device: E held-out examples of S slots, (E, S, Z), or a set
of X vectors, (X, Z). Directions are compared as given, so centre first: the mean that all latents of an encoder share
makes any two of them look alike. A zero vector has cosine 0 with everything.
"""

import numpy as np
from jaxtyping import Bool, Float

# Norms below this part of the largest one count as this much in the threshold of `informative`: the logarithm of a zero
# norm must not decide where the two classes are split.
NORM_FLOOR = 1e-3
# Similarities closer than this are tied: equal vectors differ by the rounding of their dot products.
TIE = 1e-9


def effective_rank(vectors: Float[np.ndarray, "X Z"]) -> float:
    """exp(entropy of p), p_i = sigma_i / sum sigma over the singular values, not centred; 0 if all vectors are zero.

    Roy and Vetterli 2007, "The effective rank". Between 1 (one direction) and min(X, Z) (all equally strong).
    """
    singular = np.linalg.svd(np.asarray(vectors, np.float64), compute_uv=False)
    if not singular.sum() > 0:
        return 0.0
    share = singular / singular.sum()
    share = share[share > 0]
    return float(np.exp(-(share * np.log(share)).sum()))


def pairwise_cosine(vectors: Float[np.ndarray, "X Z"]) -> float:
    """Mean cosine over all pairs of different vectors; near 1 they have collapsed. NaN for fewer than two."""
    unit = _unit(vectors)
    pairs = len(unit) * (len(unit) - 1)
    total = (unit.sum(axis=0) ** 2).sum() - (unit**2).sum()
    return float(total / pairs) if pairs else float("nan")


def matched_cosine(predicted: Float[np.ndarray, "E S Z"], target: Float[np.ndarray, "E S Z"]) -> float:
    """Mean cosine of each predicted latent to its own target."""
    return float((_unit(predicted) * _unit(target)).sum(axis=-1).mean())


def shuffled_cosine(predicted: Float[np.ndarray, "E S Z"], target: Float[np.ndarray, "E S Z"]) -> float:
    """Mean cosine of each predicted latent to the other examples' targets of the same slot; NaN for one example.

    The mean over all pairings of different examples, not over one drawn shuffle: nothing is random.
    """
    predicted, target = _unit(predicted), _unit(target)
    examples, slots = predicted.shape[:2]
    pairs = examples * (examples - 1) * slots
    total = (predicted.sum(axis=0) * target.sum(axis=0)).sum() - (predicted * target).sum()
    return float(total / pairs) if pairs else float("nan")


def norm_ratio(predicted: Float[np.ndarray, "... Z"], target: Float[np.ndarray, "... Z"]) -> float:
    """Sum of the predicted norms over the sum of the targets'; NaN where the targets are all zero."""
    total = _norm(target).sum()
    return float(_norm(predicted).sum() / total) if total > 0 else float("nan")


def informative(target: Float[np.ndarray, "... Z"]) -> Bool[np.ndarray, "..."]:
    """Which latents carry content: those above Otsu's threshold on the logarithm of the centred targets' norms.

    Otsu (1979) takes the split into two classes with the largest variance between them. Logarithms, because the classes
    are a factor apart (about 5 on scenes) however few informative cells there are. It always splits: where the norms
    form one class only, as those of photos may, the two means of `content_cosine` just describe its halves: the cells
    that are far from the mean latent and those near it, not cells with and without content. All True if all norms are
    equal.
    """
    norms = _norm(target)
    largest = norms.max(initial=0.0)
    if not largest > 0:
        return np.ones(norms.shape, bool)
    logs = np.log(np.maximum(norms, NORM_FLOOR * largest))
    ordered = np.sort(logs.ravel())
    below = np.arange(1, ordered.size)
    above = ordered.size - below
    sums = np.cumsum(ordered)
    between = below * above * (sums[:-1] / below - (sums[-1] - sums[:-1]) / above) ** 2
    between[ordered[1:] - ordered[:-1] <= TIE] = 0  # a threshold lies between two different norms
    if not between.max(initial=0.0) > 0:
        return np.ones(norms.shape, bool)
    split = between.argmax()
    return logs > (ordered[split] + ordered[split + 1]) / 2


def content_cosine(predicted: Float[np.ndarray, "... Z"], target: Float[np.ndarray, "... Z"]) -> dict[str, float]:
    """Mean cosine to the matched target on `informative` and on `empty` cells apart (NaN for none of a class), and
    `informative_share`, the part of cells in the first class (see `informative`)."""
    cosine = (_unit(predicted) * _unit(target)).sum(axis=-1)
    chosen = informative(target)
    return {
        "informative": float(cosine[chosen].mean()) if chosen.any() else float("nan"),
        "empty": float(cosine[~chosen].mean()) if not chosen.all() else float("nan"),
        "informative_share": float(chosen.mean()),
    }


def retrieval_recall(
    predicted: Float[np.ndarray, "X Z"], target: Float[np.ndarray, "X Z"], at: tuple[int, ...] = (1, 5)
) -> dict[str, float]:
    """Text -> image retrieval by cosine: `recall@k` and `chance@k` = min(k, X) / X for each k.

    Row i of predicted (from a caption) seeks row i of target (its image) among all X. Give pooled latents, or all slots
    of an example flattened into one row. Ties count as broken at random: collapsed predictions score chance.
    """
    predicted, target = _unit(predicted), _unit(target)
    hits = dict.fromkeys(at, 0.0)
    for start in range(0, len(predicted), 1024):  # by blocks: the X x X matrix of a large set would not fit
        block = slice(start, start + 1024)
        cosine = predicted[block] @ target.T
        own = (predicted[block] * target[block]).sum(axis=1, keepdims=True)
        better = (cosine > own + TIE).sum(axis=1)
        tied = (np.abs(cosine - own) <= TIE).sum(axis=1)  # with the own one
        for k in at:
            hits[k] += np.clip((k - better) / tied, 0, 1).sum()
    count = len(predicted)
    recall = {f"recall@{k}": float(hits[k] / count) for k in at}
    return recall | {f"chance@{k}": min(k, count) / count for k in at}


def nearest(
    predicted: Float[np.ndarray, "X S Z"], target: Float[np.ndarray, "E S Z"], count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each of the first X examples' predictions, the `count` targets of all E that are nearest by the cosine of all
    slots together: (indices (X, count), their cosines (X, count), the place of its own target (X,), from 1; of equal
    ones the own target comes last)."""
    flat, targets = (_unit(x.reshape(len(x), -1)) for x in (predicted, target))
    cosine = flat @ targets.T
    order = np.argsort(-cosine, axis=1, kind="stable")[:, :count]
    places = (cosine >= np.diagonal(cosine)[:, None] - TIE).sum(axis=1)
    return order, np.take_along_axis(cosine, order, axis=1), places


def latent_geometry(predicted: Float[np.ndarray, "E S Z"], target: Float[np.ndarray, "E S Z"]) -> dict[str, float]:
    """All of the above on one held-out set, flat, ready for a metrics line. Retrieval is over flattened slots."""
    content = content_cosine(predicted, target)
    flat_predicted, flat_target = (x.reshape(-1, x.shape[-1]) for x in (predicted, target))
    return {
        "effective_rank/predicted": effective_rank(flat_predicted),
        "effective_rank/target": effective_rank(flat_target),
        "cosine/matched": matched_cosine(predicted, target),
        "cosine/shuffled": shuffled_cosine(predicted, target),
        "cosine/informative": content["informative"],
        "cosine/empty": content["empty"],
        "cosine/pairwise_predicted": pairwise_cosine(flat_predicted),
        "cosine/pairwise_target": pairwise_cosine(flat_target),
        "informative_share": content["informative_share"],
        "norm_ratio": norm_ratio(predicted, target),
    } | {
        f"retrieval/{name}": value
        for name, value in retrieval_recall(
            predicted.reshape(len(predicted), -1), target.reshape(len(target), -1)
        ).items()
    }


def _norm(vectors: Float[np.ndarray, "... Z"]) -> Float[np.ndarray, "..."]:
    return np.linalg.norm(np.asarray(vectors, np.float64), axis=-1)


def _unit(vectors: Float[np.ndarray, "... Z"]) -> Float[np.ndarray, "... Z"]:
    norms = _norm(vectors)[..., None]
    return np.asarray(vectors, np.float64) / np.where(norms > 0, norms, 1)
