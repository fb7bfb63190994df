"""next_token against a float64 loop over rows and positions."""

import jax
import jax.numpy as jnp
import numpy as np

from latent_jax.losses.next_token import next_token

compiled = jax.jit(next_token, static_argnames=("chunk", "capacity"))


def batch():
    rng = np.random.default_rng(3)
    hidden, lm_head = rng.normal(size=(2, 5, 4)), rng.normal(size=(7, 4))
    targets = rng.integers(0, 7, (2, 5)).astype(np.int32)
    loss_weights = np.array([[1, 0, 1, 0.5, 0], [0, 0, 2, 1, 1.0]])
    targets[0, 0] = np.argmax(lm_head @ hidden[0, 0])  # at least one is right
    return hidden, lm_head, targets, loss_weights


def test_matches_the_definition():
    hidden, lm_head, targets, loss_weights = batch()
    total = correct = 0.0
    for row in range(2):
        for t in range(5):
            logits = lm_head @ hidden[row, t]
            probability = np.exp(logits) / np.exp(logits).sum()
            total -= loss_weights[row, t] * np.log(probability[targets[row, t]])
            correct += loss_weights[row, t] * (np.argmax(logits) == targets[row, t])
    assert correct >= 1
    with jax.enable_x64(True):
        for options in ({}, {"chunk": 3}, {"capacity": 6}):
            ours = compiled(*batch(), **options)
            np.testing.assert_allclose(ours[:2], (total, 6.5), rtol=1e-12)
            np.testing.assert_allclose(ours[2]["accuracy"], (correct, 6.5), rtol=1e-12)


def test_parts_add_up_to_the_whole():
    """What accumulation relies on: sums and weights of two halves are those of the batch."""
    hidden, lm_head, targets, loss_weights = (jnp.asarray(x) for x in batch())
    whole = compiled(hidden, lm_head, targets, loss_weights)
    halves = [compiled(hidden[i : i + 1], lm_head, targets[i : i + 1], loss_weights[i : i + 1]) for i in (0, 1)]
    jax.tree.map(lambda a, b, c: np.testing.assert_allclose(a, b + c, rtol=1e-5), whole, *halves)
