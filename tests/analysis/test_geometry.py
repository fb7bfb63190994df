"""Latent geometry against float64 loops over pairs, and on sets whose answer is known."""

import numpy as np
import pytest

from latent_jax.analysis import geometry


def cosine(a, b):
    return a @ b / np.sqrt((a @ a) * (b @ b))


def latents(examples=6, slots=3, width=5, seed=0):
    rng = np.random.default_rng(seed)
    target = rng.normal(size=(examples, slots, width))
    return target + 0.5 * rng.normal(size=target.shape), target


def orthogonal(size, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0]


def test_effective_rank_of_known_spectra():
    left, right = orthogonal(6), orthogonal(4, seed=1)
    for spectrum, expected in [
        ([1, 1, 1, 1], 4.0),
        ([2, 2, 0, 0], 2.0),
        ([5, 0, 0, 0], 1.0),
        ([3, 1, 0, 0], np.exp(-0.75 * np.log(0.75) - 0.25 * np.log(0.25))),
    ]:
        vectors = left[:, :4] @ np.diag(spectrum) @ right
        np.testing.assert_allclose(geometry.effective_rank(vectors), expected, rtol=1e-6)
        np.testing.assert_allclose(geometry.effective_rank(1e-3 * vectors.T), expected, rtol=1e-6)
    assert geometry.effective_rank(np.zeros((3, 4))) == 0


def test_cosines_are_means_over_pairs():
    predicted, target = latents()
    examples, slots = range(6), range(3)
    matched = [cosine(predicted[e, s], target[e, s]) for e in examples for s in slots]
    shuffled = [cosine(predicted[e, s], target[f, s]) for e in examples for f in examples if e != f for s in slots]
    flat = predicted.reshape(-1, 5)
    pairs = [cosine(a, b) for i, a in enumerate(flat) for j, b in enumerate(flat) if i != j]
    np.testing.assert_allclose(geometry.matched_cosine(predicted, target), np.mean(matched))
    np.testing.assert_allclose(geometry.shuffled_cosine(predicted, target), np.mean(shuffled))
    np.testing.assert_allclose(geometry.pairwise_cosine(flat), np.mean(pairs))


def test_too_few_for_a_pair_is_nan_and_zero_vectors_count_as_zero():
    one = np.ones((1, 2, 3))
    assert np.isnan(geometry.shuffled_cosine(one, one))
    assert np.isnan(geometry.pairwise_cosine(one[0, :1]))
    assert geometry.pairwise_cosine(np.array([[1.0, 0], [0, 0], [1, 0]])) == pytest.approx(1 / 3)
    assert np.isnan(geometry.norm_ratio(one, 0 * one))


def test_norm_ratio():
    predicted, target = latents()
    norms = [sum(np.linalg.norm(v) for v in x.reshape(-1, 5)) for x in (predicted, target)]
    np.testing.assert_allclose(geometry.norm_ratio(predicted, target), norms[0] / norms[1])


@pytest.mark.parametrize("share", [0.02, 0.2, 0.6])
def test_informative_finds_the_cells_five_times_as_long(share):
    rng = np.random.default_rng(4)
    full = rng.random((50, 16)) < share
    norms = np.where(full, 5.0, 1.0) * np.exp(0.15 * rng.normal(size=full.shape))
    target = rng.normal(size=(50, 16, 8))
    target *= (norms / np.linalg.norm(target, axis=-1))[..., None]
    np.testing.assert_array_equal(geometry.informative(target), full)
    target[0, 0] = 0  # a zero vector does not become a class of its own
    full[0, 0] = False
    np.testing.assert_array_equal(geometry.informative(target), full)


def test_informative_takes_the_split_with_the_largest_variance_between():
    norms = np.exp(np.random.default_rng(5).normal(size=40))
    chosen = geometry.informative(norms[:, None])
    logs = np.log(norms)

    def between(upper):
        return upper.mean() * (1 - upper.mean()) * (logs[upper].mean() - logs[~upper].mean()) ** 2

    best = max((logs > x for x in np.sort(logs)[:-1]), key=between)
    np.testing.assert_array_equal(chosen, best)


def test_informative_without_contrast_is_everything():
    for target in (np.zeros((2, 3, 4)), np.ones((2, 3, 4)), np.ones((1, 4))):
        assert geometry.informative(target).all()


def test_content_cosine_tells_the_classes_apart():
    target = np.array([[[9.0, 0], [0, 1], [1, 0], [0, 9]]])
    predicted = np.array([[[2.0, 0], [1, 0], [0, 1], [1, 1]]])
    result = geometry.content_cosine(predicted, target)
    assert result == pytest.approx({"informative": (1 + 0.5**0.5) / 2, "empty": 0.0, "informative_share": 0.5})
    assert np.isnan(geometry.content_cosine(predicted, np.ones_like(target))["empty"])


def test_retrieval_recall_ranks_among_all():
    rng = np.random.default_rng(6)
    target = rng.normal(size=(30, 4))
    predicted = target + 0.7 * rng.normal(size=target.shape)
    ranks = [sum(cosine(p, z) > cosine(p, target[i]) for z in target) for i, p in enumerate(predicted)]
    recall = geometry.retrieval_recall(predicted, target)
    assert recall == pytest.approx(
        {
            "recall@1": np.mean([r < 1 for r in ranks]),
            "recall@5": np.mean([r < 5 for r in ranks]),
            "chance@1": 1 / 30,
            "chance@5": 5 / 30,
        }
    )
    assert recall["chance@1"] < recall["recall@1"] < recall["recall@5"] < 1


def test_collapsed_latents_retrieve_at_chance():
    target = np.random.default_rng(7).normal(size=(20, 4))
    for predicted, gallery in ((target, np.ones((20, 4))), (np.zeros((20, 4)), target)):
        recall = geometry.retrieval_recall(predicted, gallery)
        assert recall["recall@1"] == pytest.approx(recall["chance@1"])
        assert recall["recall@5"] == pytest.approx(recall["chance@5"])


def test_retrieval_over_more_than_a_block():
    target = np.random.default_rng(8).normal(size=(1500, 3))
    predicted = target + 0.05 * np.random.default_rng(9).normal(size=target.shape)
    whole = geometry.retrieval_recall(predicted, target)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (predicted, target)]
    scores = unit[0] @ unit[1].T
    rank = (scores > np.diagonal(scores)[:, None]).sum(axis=1)
    assert whole["recall@5"] == pytest.approx((rank < 5).mean())


def test_latent_geometry_gathers_it_all():
    predicted, target = (x.astype(np.float32) for x in latents())
    result = geometry.latent_geometry(predicted, target)
    assert all(isinstance(value, float) and np.isfinite(value) for value in result.values())
    assert result["cosine/matched"] > result["cosine/shuffled"]
    assert result["retrieval/recall@1"] > result["retrieval/chance@1"]
    perfect = geometry.latent_geometry(target, target)
    assert perfect["retrieval/recall@1"] == pytest.approx(1)
    assert perfect["effective_rank/predicted"] == perfect["effective_rank/target"]


def test_nearest_targets_and_the_place_of_the_own_one():
    target = np.eye(4)[:, None, :] + 0.0
    predicted = np.array([[3.0, 2, 1, 0], [2.0, 1, 0, 0]])[:, None, :]
    order, cosine, places = geometry.nearest(predicted, target, 2)
    assert order.tolist() == [[0, 1], [0, 1]] and places.tolist() == [1, 2]
    np.testing.assert_allclose(cosine[0], np.array([3, 2]) / 14**0.5)
    assert geometry.nearest(np.ones((1, 1, 4)), target, 4)[2].tolist() == [4], "collapsed: no better than last"
