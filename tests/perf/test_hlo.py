"""What a compiled program does, against counts by hand on a small program that XLA compiled here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from latent_jax.perf import hlo
from latent_jax.runtime import sharding

LAYERS, ROWS, D, F = 5, 16, 64, 96


@pytest.fixture(scope="module")
def program():
    """Five layers; in each the weight is gathered, its product summed over devices; at the end one scatter."""
    mesh = sharding.make_mesh(1, 8, 1, jax.devices()[:8])

    def local(x, weights, back):
        def layer(x, w):
            y = jnp.tanh(x @ lax.all_gather(w, "fsdp", tiled=True))
            return x + lax.psum(y, "fsdp") @ back, None

        x, _ = lax.scan(layer, x, weights)
        return lax.psum_scatter(x.T, "fsdp", tiled=True)

    specs = (P("fsdp"), P(None, "fsdp"), P())
    step = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P("fsdp"), check_vma=False))
    shapes = ((8 * ROWS, D), (LAYERS, D, F), (F, D))
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip(shapes, specs, strict=True)
    ]
    return hlo.Program(step.lower(*arguments).compile().as_text())


def test_collectives_are_counted_as_often_as_they_run(program):
    found = {each.kind: each for each in hlo.collectives(program)}
    assert found.keys() == {"all-gather", "all-reduce", "reduce-scatter"}
    gather, reduce, scatter = (found[kind] for kind in ("all-gather", "all-reduce", "reduce-scatter"))
    assert (gather.bytes, gather.times, gather.loops) == (4 * D * F, LAYERS, 1)
    assert (reduce.bytes, reduce.times, reduce.loops) == (4 * ROWS * F, LAYERS, 1)
    assert (scatter.bytes, scatter.times, scatter.loops) == (4 * ROWS * D, 1, 0)
    assert {each.group for each in found.values()} == {8} and gather.ids == tuple(range(8))
    assert gather.sent == 4 * D * F * LAYERS * 7 / 8
    assert reduce.sent == 2 * 4 * ROWS * F * LAYERS * 7 / 8


def test_flops_count_every_turn_of_a_loop(program):
    assert hlo.total_flops(program) == LAYERS * 2 * 2 * ROWS * D * F


def test_traffic_takes_a_layer_s_slice_for_what_it_is(program):
    """At least every weight once and its gathered form twice; far from the whole stack in every turn."""
    stack = 4 * LAYERS * D * F
    least = stack / 8 + 2 * stack
    assert least < hlo.traffic(program) < 4 * least


def computation(*lines: str, result: str = "f32[4]") -> str:
    return "\n".join(["ENTRY %main (p: f32[4]) -> f32[4] {", *(f"  {line}" for line in lines), "}"])


@pytest.mark.parametrize(
    ("groups", "ids"),
    [
        ("replica_groups={{0,2,4},{1,3,5}}", (0, 2, 4)),
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", (0, 4)),
    ],
)
def test_every_way_to_write_a_group(groups, ids):
    text = computation(
        "%p = bf16[4,6]{1,0:T(8,128)(2,1)} parameter(0)",
        f"ROOT %r = bf16[4,48]{{1,0}} all-gather(%p), channel_id=1, {groups}, dimensions={{1}}",
    )
    (found,) = hlo.collectives(hlo.Program(text))
    assert found.ids == ids and found.bytes == 2 * 24 * len(ids)


def test_asynchronous_starts_count_once_and_groups_of_one_not_at_all():
    text = computation(
        "%p = f32[8]{0} parameter(0)",
        "%q = bf16[8]{0} parameter(1)",
        "%s = ((f32[8]{0}, bf16[8]{0}), (f32[2]{0}, bf16[2]{0})) reduce-scatter-start(%p, %q), "
        'replica_groups={{0,1,2,3}}, metadata={op_name="jit(step)/x"}',
        "%d = (f32[2]{0}, bf16[2]{0}) reduce-scatter-done(%s)",
        "%one = f32[8]{0} all-reduce(%p), replica_groups={{0},{1}}, to_apply=%add",
        "ROOT %permuted = f32[8]{0} collective-permute(%p), source_target_pairs={{0,1},{1,0}}",
    )
    scatter, permute = hlo.collectives(hlo.Program(text))
    assert (scatter.kind, scatter.bytes, scatter.source) == ("reduce-scatter", 8 * 4 + 8 * 2, "jit(step)/x")
    assert (permute.kind, permute.sent) == ("collective-permute", 32)


def test_a_collective_spread_over_several_kernels_counts_once():
    piece = 'all-gather(%p), channel_id={}, replica_groups={{{{0,1}}}}, frontend_attributes={{chain_id="3"}}'
    lines = [f"%g{i} = f32[8]{{0}} {piece.format(channel)}" for i, channel in enumerate((7, 7, 9, 7))]
    text = computation("%p = f32[4]{0} parameter(0)", *lines, "ROOT %x = f32[8]{0} all-gather(%p), channel_id=1, "
                       "replica_groups={{0,1}}")  # fmt: skip
    assert len(hlo.collectives(hlo.Program(text))) == 3


def test_a_batched_matmul_written_as_a_dilated_convolution():
    """As TPU compilers write (6, 8, 10) x (6, 10, 12): only the diagonal of the window multiplies anything."""
    text = computation(
        "%a = bf16[6,8,10]{2,1,0} parameter(0)",
        "%b = bf16[6,10,12]{2,1,0} parameter(1)",
        "ROOT %c = f32[6,8,12]{2,1,0} convolution(%a, %b), window={size=6 stride=5 lhs_dilate=6}, "
        "dim_labels=0bf_0io->0bf",
    )
    assert hlo.total_flops(hlo.Program(text)) == 2 * 6 * 8 * 10 * 12


def test_a_convolution_over_a_padded_window():
    """Against counting by hand: 8 inputs, 3 taps, padded by one; the two edges have one tap less."""
    text = computation(
        "%a = f32[2,8,5]{2,1,0} parameter(0)",
        "%b = f32[3,5,7]{2,1,0} parameter(1)",
        "ROOT %c = f32[2,8,7]{2,1,0} convolution(%a, %b), window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f",
    )
    assert hlo.total_flops(hlo.Program(text)) == 2 * 2 * 7 * 5 * (3 * 8 - 2)


@pytest.mark.parametrize(("step", "turns"), [(1, 8), (2, 4), (3, 3)])
def test_a_loop_s_turns_from_its_condition_and_its_step(step, turns):
    text = f"""
%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {{
  %p = (s32[], f32[4]{{0}}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[4]{{0}} get-tuple-element(%p), index=1
  %c = s32[] constant({step})
  %next = s32[] add(%i, %c)
  %sum = f32[4]{{0}} all-reduce(%x), replica_groups={{{{0,1}}}}, to_apply=%add
  ROOT %t = (s32[], f32[4]{{0}}) tuple(%next, %sum)
}}

%condition (p: (s32[], f32[4])) -> pred[] {{
  %p = (s32[], f32[4]{{0}}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %limit = s32[] constant(8)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}}

ENTRY %main (p: (s32[], f32[4])) -> (s32[], f32[4]) {{
  %p = (s32[], f32[4]{{0}}) parameter(0)
  ROOT %w = (s32[], f32[4]{{0}}) while(%p), condition=%condition, body=%body
}}
"""
    (found,) = hlo.collectives(hlo.Program(text))
    assert found.times == turns and found.loops == 1


def test_flops_of_a_compiled_matmul_are_those_of_xla():
    compiled = jax.jit(lambda a, b: jnp.einsum("bij,bjk->bik", a, b)).lower(np.ones((3, 8, 16)), np.ones((3, 16, 4)))
    compiled = compiled.compile()
    assert hlo.total_flops(hlo.Program(compiled.as_text())) == pytest.approx(
        compiled.cost_analysis()["flops"], rel=0.01
    )
