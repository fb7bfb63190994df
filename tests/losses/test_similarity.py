"""similarity against float64 loops written from the equations, slot by slot."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_jax.losses.similarity import similarity

KINDS = ("cosine", "l2", "smooth_l1", "contrastive")
OPTIONS = [
    {"kind": "cosine"},
    {"kind": "cosine", "norm_weighted": True, "norm_term": 0.7},
    {"kind": "l2"},
    {"kind": "smooth_l1", "beta": 0.5},
    {"kind": "contrastive", "temperature": 0.3},
    {"kind": "contrastive", "temperature": 0.3, "norm_weighted": True, "norm_term": 0.7},
]
NAMES = ["cosine", "cosine-norms", "l2", "smooth_l1", "contrastive", "contrastive-norms"]


compiled = jax.jit(similarity, static_argnames=("kind", "norm_weighted", "norm_term", "beta", "temperature"))


def cosine(a, b):
    return a @ b / np.sqrt((a @ a) * (b @ b))


def reference(predicted, target, mask, kind, norm_weighted=False, norm_term=0.0, beta=1.0, temperature=0.1):
    slots = list(zip(*np.nonzero(np.broadcast_to(mask.reshape(len(mask), -1), predicted.shape[:2]))))
    total = 0.0
    for slot in slots:
        p, z = predicted[slot], target[slot]
        if kind == "cosine":
            loss = 1 - cosine(p, z)
        elif kind == "l2":
            loss = sum((a - b) ** 2 for a, b in zip(p, z)) / len(p)
        elif kind == "smooth_l1":
            sizes = [abs(a - b) for a, b in zip(p, z)]
            loss = sum(d * d / (2 * beta) if d < beta else d - beta / 2 for d in sizes) / len(p)
        else:
            scores = [np.exp(cosine(p, target[other]) / temperature) for other in slots]
            loss = -np.log(np.exp(cosine(p, z) / temperature) / sum(scores))
        if kind in ("cosine", "contrastive"):
            loss *= z @ z / len(z) if norm_weighted else 1
            loss += norm_term * (np.linalg.norm(p) - np.linalg.norm(z)) ** 2 / len(z)
        total += loss
    return total, len(slots)


def batch(seed=0, examples=4, slots=3, width=5):
    rng = np.random.default_rng(seed)
    target = rng.normal(size=(examples, slots, width)) * rng.uniform(0.3, 3, (examples, slots, 1))
    predicted = target + rng.normal(size=target.shape)
    return predicted, target


def masks():
    each = np.array([[1, 1, 0], [0, 0, 0], [1, 0, 1], [1, 1, 1]], bool)
    return {"example": np.array([True, False, True, True]), "slot": each}


@pytest.mark.parametrize("mask", masks().values(), ids=masks())
@pytest.mark.parametrize("options", OPTIONS, ids=NAMES)
def test_matches_the_equation(options, mask):
    predicted, target = batch()
    with jax.enable_x64(True):
        total, weight, _ = compiled(predicted, target, mask, **options)
        assert total.dtype == weight.dtype == jnp.float64
    # The norms' epsilon, 1e-4, is what is left.
    np.testing.assert_allclose((total, weight), reference(predicted, target, mask, **options), rtol=1e-7)


@pytest.mark.parametrize("options", OPTIONS, ids=NAMES)
def test_gradient_is_that_of_finite_differences(options):
    predicted, target = batch()
    mask = masks()["slot"]
    with jax.enable_x64(True):
        loss = jax.jit(lambda p: similarity(p, jnp.asarray(target), jnp.asarray(mask), **options)[0])
        gradient = jax.jit(jax.grad(loss))(predicted)
        for index in np.ndindex(predicted.shape):
            step = np.zeros_like(predicted)
            step[index] = 1e-6
            difference = (loss(predicted + step) - loss(predicted - step)) / 2e-6
            np.testing.assert_allclose(gradient[index], difference, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("options", OPTIONS, ids=NAMES)
def test_masked_slots_may_hold_anything(options):
    predicted, target = (jnp.asarray(x, jnp.float32) for x in batch())
    mask = jnp.asarray(masks()["slot"])

    @jax.jit
    def run(fill):
        inputs = (jnp.where(mask[..., None], x, fill) for x in (predicted, target))
        return jax.value_and_grad(
            lambda p, z: (lambda total, *rest: (total, rest))(*similarity(p, z, mask, **options)), has_aux=True
        )(*inputs)

    clean = run(0.0)
    assert np.abs(clean[1]).sum() > 0
    assert not clean[1][~mask].any()
    for fill in (7.0, jnp.nan, jnp.inf):
        jax.tree.map(np.testing.assert_array_equal, clean, run(fill))


@pytest.mark.parametrize("options", OPTIONS, ids=NAMES)
def test_zero_vectors_have_finite_losses_and_bounded_gradients(options):
    predicted, target = (jnp.asarray(x, jnp.float32) for x in batch())
    predicted, target = predicted.at[0].set(0), target.at[1, 0].set(0).at[0, 0].set(0)
    loss = lambda p: similarity(p, target, jnp.ones(4, bool), **options)[0]
    value, gradient = jax.jit(jax.value_and_grad(loss))(predicted)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
    assert np.abs(gradient).max() < 1e6


@pytest.mark.parametrize("options", OPTIONS, ids=NAMES)
def test_nothing_valid_is_zero(options):
    predicted, target = (jnp.asarray(x, jnp.float32) for x in batch())
    loss = lambda p: similarity(p, target, jnp.zeros(4, bool), **options)[0]
    value, gradient = jax.jit(jax.value_and_grad(loss))(predicted)
    assert value == 0
    assert not gradient.any()


def test_squared_error_is_the_cosine_loss_with_norm_weight_and_norm_term():
    """At equal norms the identity of the module's docstring: l2 = 2 x norm-weighted cosine."""
    predicted, target = batch()
    predicted *= np.linalg.norm(target, axis=-1, keepdims=True) / np.linalg.norm(predicted, axis=-1, keepdims=True)
    arrays = [jnp.asarray(x, jnp.float32) for x in (predicted, target)]
    l2 = compiled(*arrays, jnp.ones(4, bool), kind="l2")[0]
    weighted = compiled(*arrays, jnp.ones(4, bool), kind="cosine", norm_weighted=True, norm_term=1.0)[0]
    np.testing.assert_allclose(l2, 2 * weighted, rtol=1e-5)


def test_no_gradient_flows_to_the_target():
    predicted, target = (jnp.asarray(x, jnp.float32) for x in batch())
    total = lambda z: sum(similarity(predicted, z, jnp.ones(4, bool), **options)[0] for options in OPTIONS)
    assert not jax.jit(jax.grad(total))(target).any()


def test_metrics():
    predicted, target = batch()
    mask = masks()["slot"]
    metrics = compiled(*(jnp.asarray(x, jnp.float32) for x in batch()), jnp.asarray(mask), kind="contrastive")[2]
    slots = list(zip(*np.nonzero(mask)))
    cosines = [cosine(predicted[s], target[s]) for s in slots]
    np.testing.assert_allclose(metrics["cosine"], (sum(cosines), len(slots)), rtol=1e-5)
    norms = [sum(np.linalg.norm(x[s]) for s in slots) for x in (predicted, target)]
    np.testing.assert_allclose(metrics["norm_ratio"], norms, rtol=1e-5)
    nearest = [max(slots, key=lambda other, s=s: cosine(predicted[s], target[other])) == s for s in slots]
    assert 0 < sum(nearest) < len(slots)
    np.testing.assert_allclose(metrics["accuracy"], (sum(nearest), len(slots)))


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_computed_in_float32(kind):
    predicted, target = (jnp.asarray(x, jnp.bfloat16) for x in batch())
    total, weight, metrics = compiled(predicted, target, jnp.ones(4, bool), kind=kind)
    assert {x.dtype for x in jax.tree.leaves((total, weight, metrics))} == {jnp.dtype(jnp.float32)}
    exact = [np.asarray(x, np.float64) for x in (predicted, target)]
    np.testing.assert_allclose(total, reference(*exact, np.ones(4, bool), kind)[0], rtol=1e-5)


def test_unknown_kind_says_what_it_takes():
    arrays = [jnp.asarray(x, jnp.float32) for x in batch()]
    with pytest.raises(Exception, match="kind"):
        similarity(*arrays, jnp.ones(4, bool), kind="euclid")
