"""infonce, sigmoid and relational against float64 double loops over the valid examples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_jax.losses.alignment import infonce, relational, sigmoid

SCALE, BIAS = 1.3, -2.0
LOSSES = {
    "infonce": lambda p, z, m, scale=SCALE, bias=BIAS: infonce(p, z, m, logit_scale=jnp.asarray(scale)),
    "sigmoid": lambda p, z, m, scale=SCALE, bias=BIAS: sigmoid(
        p, z, m, logit_scale=jnp.asarray(scale), logit_bias=jnp.asarray(bias)
    ),
    "relational": lambda p, z, m, scale=SCALE, bias=BIAS: relational(p, z, m),
}
LOSSES = {name: jax.jit(loss) for name, loss in LOSSES.items()}
MASK = np.array([1, 1, 0, 1, 0, 1, 1], bool)


def batch(seed=1, examples=7, width=4):
    rng = np.random.default_rng(seed)
    target = rng.normal(size=(examples, width))
    return target + 0.8 * rng.normal(size=target.shape), target


def cosine(a, b):
    return a @ b / np.sqrt((a @ a) * (b @ b))


def reference_infonce(predicted, target, scale=SCALE):
    score = lambda i, j: np.exp(np.exp(scale) * cosine(predicted[i], target[j]))
    everyone = range(len(predicted))
    total = 0.0
    for i in everyone:
        total -= np.log(score(i, i) / sum(score(i, j) for j in everyone)) / 2
        total -= np.log(score(i, i) / sum(score(j, i) for j in everyone)) / 2
    return total


def reference_sigmoid(predicted, target, scale=SCALE, bias=BIAS):
    total = 0.0
    for i in range(len(predicted)):
        for j in range(len(target)):
            sign = 1 if i == j else -1
            logit = np.exp(scale) * cosine(predicted[i], target[j]) + bias
            total -= np.log(1 / (1 + np.exp(-sign * logit)))
    return total


def reference_relational(predicted, target):
    differences = [
        (cosine(predicted[i], predicted[j]) - cosine(target[i], target[j])) ** 2
        for i in range(len(predicted))
        for j in range(len(predicted))
        if i != j
    ]
    return len(predicted) * np.mean(differences)


REFERENCES = {"infonce": reference_infonce, "sigmoid": reference_sigmoid, "relational": reference_relational}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("mask", [MASK, np.ones(7, bool)], ids=["masked", "full"])
def test_matches_the_equation(name, mask):
    predicted, target = batch()
    with jax.enable_x64(True):
        total, weight, _ = LOSSES[name](predicted, target, mask)
        assert total.dtype == weight.dtype == jnp.float64
        assert weight == mask.sum()
    np.testing.assert_allclose(total, REFERENCES[name](predicted[mask], target[mask]), rtol=1e-7)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_finite_differences(name):
    predicted, target = batch()
    with jax.enable_x64(True):

        @jax.jit
        def loss(predicted, scalars):
            return LOSSES[name](predicted, jnp.asarray(target), jnp.asarray(MASK), *scalars)[0]

        arguments = predicted, np.array([SCALE, BIAS])
        gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))(*arguments)
        for position, gradient in enumerate(gradients):
            for index in np.ndindex(gradient.shape):
                step = np.zeros(gradient.shape)
                step[index] = 1e-6
                up, down = (
                    loss(*(x + sign * step if i == position else x for i, x in enumerate(arguments)))
                    for sign in (1, -1)
                )
                np.testing.assert_allclose(gradient[index], (up - down) / 2e-6, rtol=1e-6, atol=1e-8)
        expected = {"infonce": (True, False), "sigmoid": (True, True), "relational": (False, False)}
        assert tuple(map(bool, gradients[1] != 0)) == expected[name]


@pytest.mark.parametrize("name", LOSSES)
def test_masked_examples_may_hold_anything(name):
    predicted, target = (jnp.asarray(x, jnp.float32) for x in batch())
    mask = jnp.asarray(MASK)

    @jax.jit
    def run(fill):
        inputs = (jnp.where(mask[:, None], x, fill) for x in (predicted, target))
        return jax.value_and_grad(
            lambda p, z: (lambda total, *rest: (total, rest))(*LOSSES[name](p, z, mask)), has_aux=True
        )(*inputs)

    clean = run(0.0)
    assert np.abs(clean[1]).sum() > 0
    assert not clean[1][~MASK].any()
    for fill in (7.0, jnp.nan, jnp.inf):
        jax.tree.map(np.testing.assert_array_equal, clean, run(fill))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("valid", [0, 1])
def test_too_few_examples_are_finite(name, valid):
    predicted, target = (jnp.asarray(x, jnp.float32) for x in batch())
    mask = jnp.arange(7) < valid
    value, gradient = jax.jit(jax.value_and_grad(lambda p: LOSSES[name](p, target, mask)[0]))(predicted)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
    if valid == 0 or name != "sigmoid":
        assert abs(value) < 1e-6  # nothing to tell apart


@pytest.mark.parametrize("name", LOSSES)
def test_zero_vectors_and_the_target(name):
    predicted, target = (jnp.asarray(x, jnp.float32) for x in batch())
    predicted, target = predicted.at[0].set(0), target.at[1].set(0)
    loss = lambda p, z: LOSSES[name](p, z, jnp.asarray(MASK))[0]
    gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))(predicted, target)
    assert np.isfinite(gradients[0]).all()
    assert np.abs(gradients[0]).sum() > 0
    assert not gradients[1].any()


def test_scale_of_infonce_is_held_at_a_hundred():
    arrays = [jnp.asarray(x) for x in (*map(np.float32, batch()), MASK)]
    held, at_limit = (LOSSES["infonce"](*arrays, scale=s)[0] for s in (9.0, np.log(100.0)))
    np.testing.assert_allclose(held, at_limit, rtol=1e-5)


def test_metrics():
    predicted, target = batch()
    p, z = predicted[MASK], target[MASK]
    arrays = [jnp.asarray(x) for x in (*map(np.float32, batch()), MASK)]
    hits = sum(int(np.argmax([cosine(a, b) for b in z])) == i for i, a in enumerate(p))
    assert 0 < hits < len(p)
    for name in ("infonce", "sigmoid"):
        np.testing.assert_allclose(LOSSES[name](*arrays)[2]["accuracy"], (hits, len(p)))
    metrics = LOSSES["relational"](*arrays)[2]
    for name, values in (("predicted_cosine", p), ("target_cosine", z)):
        mean = np.mean([cosine(a, b) for i, a in enumerate(values) for j, b in enumerate(values) if i != j])
        np.testing.assert_allclose(metrics[name][0] / metrics[name][1], mean, rtol=1e-4)


@pytest.mark.parametrize("name", LOSSES)
def test_bfloat16_is_computed_in_float32(name):
    predicted, target = (jnp.asarray(x, jnp.bfloat16) for x in batch())
    result = LOSSES[name](predicted, target, jnp.ones(7, bool))
    assert {x.dtype for x in jax.tree.leaves(result)} == {jnp.dtype(jnp.float32)}
    exact = [np.asarray(x, np.float64) for x in (predicted, target)]
    np.testing.assert_allclose(result[0], REFERENCES[name](*exact), rtol=1e-4)
