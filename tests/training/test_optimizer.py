"""The optimiser: its schedules at the points that matter, what decays, the head's own rate, and clipping."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from latent_jax.config.training import Train
from latent_jax.methods import pretrain
from latent_jax.models.parameters import Structure
from latent_jax.training import optimizer
from latent_jax.training.state import new_model
from tests.reference import small

DECAYED = {
    "vlm.text.blocks.q": True,
    "vlm.text.blocks.q_bias": False,
    "vlm.text.norm": False,
    "head.fc1": True,
    "head.slots": False,
}
PATHS = list(DECAYED)


@pytest.mark.parametrize(
    ("name", "middle", "end"),
    [
        # Half of a cosine from 1 to 0.1 is their mean, and so is half of a line.
        ("cosine", 0.55, 0.1),
        ("linear", 0.55, 0.1),
        ("constant", 1.0, 1.0),
    ],
)
def test_schedule_at_warm_up_peak_middle_and_end(name, middle, end):
    train = Train(steps=100, warmup=0.1, learning_rate=2e-3, end_factor=0.1, schedule=name)
    rate = optimizer.schedule(train)
    for step, factor in {0: 0.1, 4: 0.5, 9: 1.0, 10: 1.0, 55: middle, 100: end, 1000: end}.items():
        np.testing.assert_allclose(rate(jnp.int32(step)), 2e-3 * factor, rtol=1e-5, err_msg=f"step {step}")
    quarter = {"cosine": 0.1 + 0.9 * (1 + np.cos(np.pi * 0.25)) / 2, "linear": 0.775, "constant": 1.0}[name]
    np.testing.assert_allclose(rate(jnp.float32(10 + 22.5)), 2e-3 * quarter, rtol=1e-5)


def test_no_warm_up_starts_at_the_peak_and_all_warm_up_ends_there():
    assert float(optimizer.schedule(Train(steps=10, warmup=0.0, learning_rate=1e-3))(0)) == pytest.approx(1e-3)
    rise = optimizer.schedule(Train(steps=10, warmup=1.0, learning_rate=1e-3))
    np.testing.assert_allclose([rise(step) for step in range(10)], np.arange(1, 11) * 1e-4, rtol=1e-5)


def test_matrices_decay_and_nothing_else():
    config = small.config(model={"lora_rank": 2, "trainable": "language"})
    structure = Structure.of(nnx.eval_shape(lambda: new_model(config, pretrain.METHOD, small.model_config())))
    decayed = {path for path in structure.variables if structure.trained(path) and structure.decayed(path)}
    matrices = [
        "vlm.text.embed",
        "vlm.text.lm_head",
        "vlm.text.blocks.down",
        "vlm.vision.patch",
        "head.fc1",
        "head.fc2",
    ]
    matrices += ["vlm.text.blocks.lora.q_a", "vlm.text.blocks.lora.q_b", "vlm.vision.merger.fc1"]
    assert decayed >= {*matrices}
    # The rule that was written by names before: norms, biases, slot embeddings and scalars do not.
    names = ("norm", "norm1", "norm2", "attn_norm", "mlp_norm", "slots", "logit_scale", "mean", "scale")
    last = {path: path.rsplit(".", 1)[-1] for path in structure.variables}
    assert {path for path in last if path not in decayed} == {
        path for path, name in last.items() if name in names or (name.endswith("bias") and ".lora." not in path)
    }


def adamw(train: Train, values, gradients, path: str) -> np.ndarray:
    """AdamW by the book, float64: gradients of every step -> the value after the last."""
    value = np.asarray(values[path], np.float64)
    first = second = np.zeros_like(value)
    for t, step in enumerate(gradients, 1):
        norm = np.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in step.values()))
        g = step[path].astype(np.float64) * (min(1.0, train.clip / norm) if train.clip else 1.0)
        first = train.beta1 * first + (1 - train.beta1) * g
        second = train.beta2 * second + (1 - train.beta2) * g**2
        change = first / (1 - train.beta1**t) / (np.sqrt(second / (1 - train.beta2**t)) + train.epsilon)
        if DECAYED[path]:
            change = change + train.weight_decay * value
        rate = train.head_learning_rate or train.learning_rate if path.startswith("head.") else train.learning_rate
        value = value - rate * change
    return value


@pytest.mark.parametrize("clip", [0.0, 0.5, 100.0])
@pytest.mark.parametrize("rates", [(1e-2, 0.0), (1e-2, 5e-2), (0.0, 5e-2), (1e-46, 5e-2), (1e-30, 5e-2)])
def test_updates_are_those_of_adamw(clip, rates):
    train = Train(steps=3, learning_rate=rates[0], warmup=0.0, schedule="constant", clip=clip, weight_decay=0.3)
    train = dataclasses.replace(train, head_learning_rate=rates[1])
    rng = np.random.default_rng(0)
    values = {path: jnp.asarray(rng.normal(size=(3, 4)), jnp.float32) for path in PATHS}
    gradients = [
        {path: rng.normal(size=(3, 4)).astype(np.float32) * scale for path in PATHS} for scale in (1.0, 5.0, 0.01)
    ]
    transform = optimizer.make(train, PATHS, {path for path in PATHS if DECAYED[path]})
    state, now = transform.init(values), values
    for step in gradients:
        updates, state = transform.update(step, state, now)
        now = optax.apply_updates(now, updates)
    for path in PATHS:
        np.testing.assert_allclose(now[path], adamw(train, values, gradients, path), rtol=2e-5, atol=1e-6, err_msg=path)


def test_what_is_logged_is_what_was_applied():
    both = Train(steps=10, warmup=0.5, learning_rate=0.0, head_learning_rate=1e-3)
    found = {name: float(rate(jnp.int32(1))) for name, rate in optimizer.rates(both, PATHS).items()}
    assert found == pytest.approx({"learning_rate": 0.0, "head_learning_rate": 4e-4})
    assert optimizer.rates(both, [path for path in PATHS if not path.startswith("head.")]).keys() == {"learning_rate"}
    assert optimizer.rates(Train(), PATHS).keys() == {"learning_rate"}
