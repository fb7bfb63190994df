"""The training step: gradients of one method's loss, summed exactly over micro-steps and devices, then one update."""

from collections.abc import Mapping
from typing import Any, Protocol, cast, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from latent_jax.errors import UserError
from latent_jax.methods.contract import Terms
from latent_jax.runtime import sharding
from latent_jax.runtime.devices import compiler_options
from latent_jax.training import optimizer
from latent_jax.training.state import AbstractState, Arrays, Setup, TrainState

Losses = tuple[Array, tuple[Arrays, Terms]]  # the whole loss, the mean of every term, metrics


@runtime_checkable
class Step(Protocol):
    """A jitted step: (state, batch with leading (A, G)) -> (new state, metrics as scalars)."""

    def __call__(self, state: TrainState, batch: Mapping[str, Array], /) -> tuple[TrainState, dict[str, Array]]: ...

    def lower(self, state: TrainState | AbstractState, batch: Mapping[str, Any], /) -> Any:
        """As jax.jit's."""

    def _cache_size(self) -> int:
        """How often it was compiled."""


def check_loss(
    found: Any, coefficients: Mapping[str, Any], weights: Mapping[str, Any], method: str
) -> tuple[Terms, Terms]:
    """What a method's loss returned. Raises UserError where it is of another form, or of other terms than the rest."""
    try:
        terms, metrics = found
        pairs = [pair for named in (terms, metrics) for pair in named.values()]
        if not all(len(pair) == 2 and jnp.shape(pair[0]) == jnp.shape(pair[1]) == () for pair in pairs):
            raise ValueError("not pairs of scalars")
    except (TypeError, ValueError, AttributeError):
        raise UserError(
            f"config.method: the loss of {method} is not ({{term: (sum, weight)}}, {{metric: (sum, weight)}}) with "
            "scalars for sum and weight"
        ) from None
    if not terms.keys() == coefficients.keys() == weights.keys():
        raise UserError(
            f"config.method: the loss of {method} has the terms {sorted(terms)}, its coefficients "
            f"{sorted(coefficients)}, its weights {sorted(weights)}; expected the same"
        )
    return terms, metrics


def make_step(setup: Setup) -> Step:
    """The jitted step: (state, batch with leading (A, G)) -> (new state, metrics as scalars).

    Every term is a sum over tokens, slots or examples divided by its weight over the *whole* step, which follows from
    the masks of the batch. So micro-steps and devices add their gradients without knowing of each other.
    """
    config, method = setup.config, setup.method
    rates = optimizer.rates(config.train, setup.trainable)

    def gradients(state: TrainState, batch: Arrays) -> tuple[Losses, Arrays]:
        fraction = state.step.astype(jnp.float32) / config.train.steps
        coefficients = method.coefficients(config, fraction)
        totals = {term: jnp.maximum(weight, 1.0) for term, weight in method.weights(batch, config).items()}

        def objective(trainable: Arrays, micro: Arrays) -> Losses:
            model = setup.build(trainable, state.frozen, setup.attention.implementation)
            terms, metrics = check_loss(method.loss(model, micro, config), coefficients, totals, config.method)
            means = {term: total / totals[term] for term, (total, _) in terms.items()}
            whole = sum(coefficients[term] * mean for term, mean in means.items())
            return cast(Array, whole), (means, metrics)

        def micro_step(carry: tuple[Losses, Arrays], micro: Arrays) -> tuple[tuple[Losses, Arrays], None]:
            out, grads = jax.value_and_grad(objective, has_aux=True)(state.trainable, micro)
            return jax.tree.map(jnp.add, carry, (out, pin(grads))), None

        first = jax.tree.map(lambda x: x[0], batch)
        if jax.tree.leaves(batch)[0].shape[0] == 1:
            out, grads = jax.value_and_grad(objective, has_aux=True)(state.trainable, first)
            return out, pin(grads)
        zeros = jax.eval_shape(lambda: jax.value_and_grad(objective, has_aux=True)(state.trainable, first))
        out, grads = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), zeros)
        return jax.lax.scan(micro_step, (out, pin(grads)), batch)[0]

    def pin(grads: Arrays) -> Arrays:
        # The partitioner may drop a gradient's fsdp axis and all-reduce the whole of it; it must be reduce-scattered.
        return {path: jax.lax.with_sharding_constraint(g, setup.sharding(path)) for path, g in grads.items()}

    def step(state: TrainState, batch: Arrays) -> tuple[TrainState, Arrays]:
        with jax.sharding.use_abstract_mesh(setup.mesh.abstract_mesh):
            return update(state, batch)

    def update(state: TrainState, batch: Arrays) -> tuple[TrainState, Arrays]:
        (total, (means, extra)), grads = gradients(state, batch)
        updates, opt_state = setup.transform.update(grads, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        metrics = {"loss/total": total} | {f"loss/{term}": mean for term, mean in means.items()}
        metrics |= {name: value / jnp.maximum(weight, 1.0) for name, (value, weight) in extra.items()}
        metrics |= {name: jnp.float32(rate(state.step)) for name, rate in rates.items()}
        metrics["grad_norm"] = optax.global_norm(grads)
        return TrainState(state.step + 1, trainable, state.frozen, opt_state), metrics

    # Where the state lives is decided once, by its own arrays; the batch is split by groups over replica and fsdp.
    abstract = setup.abstract()
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    made = jax.jit(
        step,
        in_shardings=(places, sharding.batch_sharding(setup.mesh)),
        out_shardings=(places, sharding.replicated(setup.mesh)),
        donate_argnums=0,
        compiler_options=compiler_options(setup.mesh.devices.flat[0].platform),
    )
    return cast(Step, made)
