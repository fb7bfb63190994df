"""The training step: the same numbers on any mesh, in any number of micro-steps, whatever is recomputed."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from latent_jax.methods import pretrain
from latent_jax.ops import attention, flash
from latent_jax.runtime import sharding
from latent_jax.training.state import first_state, make_setup
from latent_jax.training.step import make_step
from tests.reference import small
from tests.reference.ours import QUICK

STEPS = 5


def train(config, batches, mesh=(1, 1, 1), kernel="reference"):
    """(metrics of every step, final state) from one and the same first state."""
    mesh = sharding.make_mesh(*mesh, jax.devices()[: np.prod(mesh)])
    setup = make_setup(config, pretrain.METHOD, small.model_config(), mesh, {})
    setup = dataclasses.replace(setup, attention=attention.Choice(kernel))
    places = jax.tree.map(lambda leaf: leaf.sharding, setup.abstract())
    state = jax.device_put(start(), places)
    batches = [jax.device_put(batch, sharding.batch_sharding(mesh)) for batch in batches]
    step = make_step(setup).lower(state, batches[0]).compile(compiler_options=QUICK)
    found = []
    for batch in batches:
        state, metrics = step(state, batch)
        found.append(jax.device_get(metrics))
    return found, state


@functools.cache
def start():
    """The first state, on the host: a step may not eat it."""
    mesh = sharding.make_mesh(1, 1, 1, jax.devices()[:1])
    return jax.device_get(first_state(make_setup(small.config(), pretrain.METHOD, small.model_config(), mesh, {}), ""))


@functools.cache
def on_one_device():
    config = small.config()
    found, state = train(config, small.batches(config, STEPS))
    return found, jax.device_get(state)


def check_equal(found, expected, names=None):
    """Metrics of every step, and every trained array, to 1e-5 of its largest entry (or of .01)."""
    (metrics, state), (want_metrics, want_state) = found, expected
    assert len(metrics) == len(want_metrics)
    for step, (got, want) in enumerate(zip(metrics, want_metrics, strict=True), 1):
        assert got.keys() == want.keys()
        for name in names or want:
            np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=1e-6, err_msg=f"{name} of step {step}")
    assert int(state.step) == int(want_state.step) == len(metrics)
    for path, want in want_state.trainable.items():
        np.testing.assert_allclose(
            state.trainable[path], want, rtol=0, atol=1e-5 * max(np.abs(want).max(), 1e-2), err_msg=path
        )


def test_a_run_moves_every_trained_weight_and_nothing_else():
    found, state = on_one_device()
    for metrics in found:
        assert {"loss/total", "loss/next_token", "loss/similarity", "loss/alignment", "grad_norm"} <= metrics.keys()
        weighted = metrics["loss/next_token"] + metrics["loss/similarity"] + 0.1 * metrics["loss/alignment"]
        np.testing.assert_allclose(metrics["loss/total"], weighted, rtol=1e-6)
        assert metrics["grad_norm"] > 0
    assert found[-1]["loss/total"] < found[0]["loss/total"]
    still = {path for path, a in state.trainable.items() if np.array_equal(a, start().trainable[path])}
    assert still == {"head.logit_bias"}  # InfoNCE has no bias
    assert all(np.array_equal(a, start().frozen[path]) for path, a in state.frozen.items())


@pytest.mark.parametrize("mesh", [(1, 8, 1), (2, 4, 1), (1, 4, 2), (1, 2, 4)], ids=str)
def test_any_mesh_equals_one_device(mesh):
    config = small.config()
    metrics, state = train(config, small.batches(config, STEPS), mesh)
    replica, fsdp, tp = mesh
    q, mu = (arrays["vlm.text.blocks.q"] for arrays in (state.trainable, state.opt_state[1].mu))
    for array in (q, mu):  # L D N H: stored in parts, not only computed so
        assert array.addressable_shards[0].data.shape == (2, 64 // fsdp, 4 // tp, 16)
    check_equal((metrics, state), on_one_device())


def test_a_step_is_compiled_as_its_platform_wants_it(monkeypatch):
    monkeypatch.setattr("latent_jax.training.step.compiler_options", lambda platform: {f"made_up_for_{platform}": 1})
    config = small.config()
    setup = make_setup(
        config, pretrain.METHOD, small.model_config(), sharding.make_mesh(1, 1, 1, jax.devices()[:1]), {}
    )
    with pytest.raises(jax.errors.JaxRuntimeError, match="made_up_for_cpu"):
        make_step(setup).lower(setup.abstract(), small.batches(config, 1)[0]).compile()


def test_micro_steps_add_up_to_the_whole_step():
    """The additive terms; the alignment of a batch is among the examples of one micro-step."""
    config = small.config(loss=dict(alignment_weight=0.0), train=dict(accumulate=2))
    halves = small.batches(config, 2, micro=2)
    wholes = [{key: value.reshape(1, -1, *value.shape[2:]) for key, value in batch.items()} for batch in halves]
    names = {"loss/total", "loss/next_token", "loss/similarity", "similarity/cosine", "grad_norm"}
    check_equal(train(config, halves), train(config, wholes), names)


@pytest.mark.parametrize("change", [dict(remat="full", unroll=2), dict(remat="dots")], ids=str)
def test_recomputing_and_unrolling_change_no_number(change):
    metrics, state = on_one_device()
    config = small.config(model=change)
    check_equal(train(config, small.batches(config, STEPS)), (metrics, state))


@pytest.mark.parametrize("kernel", [pytest.param("splash", marks=pytest.mark.slow), "cudnn"])
def test_the_step_is_the_same_by_every_attention_kernel(kernel, monkeypatch):
    """On a mesh that splits rows and heads: splash interpreted, cuDNN's place taken by XLA's kernel."""
    monkeypatch.setattr(flash, "splash", functools.partial(flash.splash, interpret=True))
    monkeypatch.setattr(flash, "splash_runs", functools.partial(flash.splash_runs, interpret=True))
    monkeypatch.setattr(flash, "cudnn", functools.partial(flash.cudnn, kernel="xla"))
    config = small.config()
    found = train(config, small.batches(config, 2), (1, 2, 2), kernel)
    metrics, _ = on_one_device()
    for got, want in zip(found[0], metrics, strict=False):
        for name, value in want.items():
            np.testing.assert_allclose(got[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
