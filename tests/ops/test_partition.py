"""Gathered weights and pinned rows: the same numbers, and gradients that are scattered instead of summed whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from latent_jax.models.parameters import Declare
from latent_jax.models.remat import rematerialise
from latent_jax.ops import partition
from latent_jax.perf import hlo
from latent_jax.runtime import sharding

LAYERS, D, F, ROWS = 4, 64, 192, 16


class Block(nnx.Module):
    def __init__(self):
        declare = Declare(dict(L=LAYERS, D=D, F=F), nnx.Rngs(0), jnp.float32)
        self.norm, self.up, self.down = (declare.normal(axes, "D") for axes in ("L D", "L D F", "L F D"))


def loss(block: Block, x, remat: str):
    def body(x, block):
        block = partition.gather_module(block)
        y = x * block.norm[...]
        x = x + jnp.einsum("BF,FD->BD", jax.nn.silu(jnp.einsum("BD,DF->BF", y, block.up[...])), block.down[...])
        return partition.rows(x), None

    x, _ = jax.lax.scan(rematerialise(body, remat), partition.rows(x), block)
    return (x * x).mean()


def on_mesh(sizes, remat="full"):
    """((loss, gradients), the compiled program's collectives) on a mesh of 8."""
    mesh = sharding.make_mesh(*sizes, jax.devices()[:8])
    block, x = inputs()

    def step(block, x):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return jax.value_and_grad(loss)(block, x, remat)

    places = jax.tree.map(
        lambda v: v.replace(sharding.weight_sharding(v.get_metadata("axes"), v.shape, mesh)),
        block,
        is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
    )
    scalar = NamedSharding(mesh, P())
    rows = NamedSharding(mesh, P(partition.GROUPS))
    compiled = jax.jit(step, in_shardings=(places, rows), out_shardings=(scalar, places)).lower(block, x).compile()
    block = jax.tree.map(jax.device_put, block, places)
    return compiled(block, jax.device_put(x, rows)), hlo.collectives(hlo.Program(compiled.as_text()))


def inputs():
    return Block(), jnp.asarray(np.random.default_rng(0).normal(size=(ROWS, D)), jnp.float32)


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 4, 1), (1, 4, 2), (8, 1, 1), (2, 1, 4)], ids=str)
@pytest.mark.parametrize("remat", ["none", "full"])
def test_gathered_by_layer_the_numbers_are_those_of_one_device(sizes, remat):
    (value, gradients), _ = on_mesh(sizes, remat)
    expected, wanted = jax.value_and_grad(loss)(*inputs(), "none")
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6), gradients, wanted)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_a_layer_s_weights_are_gathered_and_their_gradients_scattered(remat):
    _, moved = on_mesh((1, 8, 1), remat)
    matrix = 4 * D * F
    gathered = [each for each in moved if each.kind == "all-gather" and each.bytes >= matrix]
    # Up and down, forward and again for the backward pass: under no policy is a gathered weight kept.
    assert sum(each.times for each in gathered) == 2 * 2 * LAYERS
    assert {each.loops for each in gathered} == {1}
    # Nothing larger than a layer is reduced. (XLA's CPU compiler has no pass that turns a reduction whose parts alone
    # are taken into a reduce-scatter; the GPU and TPU programs are looked at in tests/test_plan.py.)
    reduced = [each for each in moved if each.kind in ("all-reduce", "reduce-scatter") and each.bytes >= matrix]
    assert {each.bytes for each in reduced} <= {matrix, 2 * matrix, 2 * matrix + 4 * D}


def test_without_a_mesh_nothing_happens():
    block, x = inputs()
    assert partition.ambient() is None
    assert partition.gather_module(block) is block and partition.rows(x) is x
    assert partition.gather(x, "B D") is x


def test_rows_that_do_not_divide_are_left_alone():
    mesh = sharding.make_mesh(1, 8, 1, jax.devices()[:8])
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        x = jnp.ones((12, 4))
        assert partition.rows(x) is x
