"""A loss on held-out data while training: the training loss, without gradients, over the same records every time."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array

from latent_jax.config.training import Config, mixture
from latent_jax.data import packing, pipeline, sources
from latent_jax.data.chat import Processor
from latent_jax.errors import UserError
from latent_jax.methods.contract import Batch, Terms
from latent_jax.runtime import hosts, sharding
from latent_jax.training.shapes import layout_of
from latent_jax.training.state import Setup, TrainState

PREFIX = "validation/"
LOSS = f"{PREFIX}loss/total"


def open_records(config: Config) -> Sequence[dict]:
    """The first `evaluate.examples` records of the held-out split of the run's first source, or of its holdout.

    Raises UserError where there is none.
    """
    name, data = mixture(config.data.name)[0][0], config.data
    if data.latent_cache:
        raise UserError("config.evaluate.every: held-out images have no latent cache; expected 0 beside latent_cache")
    if not data.holdout and config.evaluate.split == data.split:
        raise UserError(f"config.evaluate.split: {data.split!r} is what the run trains on; expected a held-out split")
    return sources.first(sources.held_out(name, data, config.evaluate.split, config.seed), config.evaluate.examples)


def make_validation(
    setup: Setup, records: Sequence[dict], processor: Processor, batch_shape: packing.BatchShape
) -> Callable[[TrainState], dict[str, float]]:
    """A state -> {"validation/loss/total", "validation/loss/TERM", "validation/METRIC"}; every host calls it.

    Each is a sum over all records divided by its weight over all of them; a loss over a batch (alignment) is over
    batches of these. Terms are weighted as in the step that comes next.
    """
    config, method, mesh = setup.config, setup.method, setup.mesh
    own = hosts.own_groups(mesh, batch_shape.groups)

    @jax.jit
    def sums(state: TrainState, batch: Batch) -> tuple[Terms, Terms, dict[str, Array]]:
        coefficients = method.coefficients(config, state.step.astype(jnp.float32) / config.train.steps)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            model = setup.build(state.trainable, state.frozen, setup.attention.implementation)
            first, rest = (jax.tree.map(part, batch) for part in (lambda x: x[0], lambda x: x[1:]))
            add = lambda carry, micro: (jax.tree.map(jnp.add, carry, method.loss(model, micro, config)), None)
            found, _ = jax.lax.scan(add, method.loss(model, first, config), rest)
        return jax.lax.with_sharding_constraint((*found, coefficients), sharding.replicated(mesh))

    def batches() -> Iterator[dict[str, jax.Array]]:
        examples = pipeline.usable(records, layout_of(method, config, processor), processor, batch_shape)
        for batch in packing.batches(examples, batch_shape):
            yield hosts.place({name: array[:, own] for name, array in batch.items()}, mesh, batch_shape.groups)

    def validate(state: TrainState) -> dict[str, float]:
        totals: dict[str, float] = defaultdict(float)
        weights: dict[str, float] = defaultdict(float)
        coefficients: dict[str, Array] = {}
        for batch in batches():
            terms, metrics, coefficients = jax.device_get(sums(state, batch))
            for name, (total, weight) in ({f"loss/{term}": pair for term, pair in terms.items()} | metrics).items():
                totals[name] += float(total)
                weights[name] += float(weight)
        if not totals:
            raise UserError("config.evaluate.split: holds no record to measure the loss on; expected at least one")
        means = {name: totals[name] / max(weights[name], 1.0) for name in totals}
        weighted = sum(float(factor) * means[f"loss/{term}"] for term, factor in coefficients.items())
        return {f"{PREFIX}{name}": value for name, value in {"loss/total": weighted, **means}.items()}

    return validate


def best(lines: Iterable[Mapping]) -> dict[str, float]:
    """{"validation/best_step", "validation/best_loss"} of a run's metrics: noted, and no checkpoint is chosen by it."""
    found = [(line[LOSS], line["step"]) for line in lines if line.get(LOSS) is not None]
    return {f"{PREFIX}best_step": min(found)[1], f"{PREFIX}best_loss": min(found)[0]} if found else {}
