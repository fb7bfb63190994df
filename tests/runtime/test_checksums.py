"""Sums of arrays: against the slow obvious ones, on any device and mesh, and sensitive to every bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from latent_jax.runtime import checksums

DTYPES = (np.float32, jnp.bfloat16, np.float16, np.int32, np.uint8, np.bool_)


def slow(array: np.ndarray) -> list[int]:
    words = np.ascontiguousarray(array).reshape(-1).view(f"u{array.dtype.itemsize}").tolist()
    return [sum(words) % 2**32, sum((2 * place + 1) * word for place, word in enumerate(words)) % 2**32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (3, 7, 11), (2, 40_000)])
def test_both_ways_agree_with_the_definition(dtype, shape):
    array = np.asarray(np.random.default_rng(0).standard_normal(shape) * 50).astype(dtype)
    wanted = {"a.0": slow(array)}
    assert checksums.of({"a": [array]}) == wanted
    assert checksums.of({"a": [jnp.asarray(array)]}) == wanted
    device = jax.device_get(checksums._device({"a": jnp.asarray(array)}))["a"]
    assert [int(part) for part in device[:2]] == wanted["a.0"]


def test_sums_know_nothing_of_the_mesh():
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    array = np.random.default_rng(0).standard_normal((8, 6, 4)).astype(np.float32)
    for spec in (P(), P("x"), P("x", "y"), P(None, "y", "x")):
        placed = jax.device_put(array, NamedSharding(mesh, spec))
        device = jax.device_get(checksums._device({"a": placed}))["a"]
        assert [int(part) for part in device[:2]] == slow(array) == checksums.of({"a": placed})["a"]


def test_every_flipped_bit_and_every_exchange_is_noticed():
    array = np.random.default_rng(0).standard_normal(50).astype(np.float32)
    whole = checksums.of({"a": array})
    for bit in range(array.nbytes * 8):
        damaged = array.copy()
        damaged.view(np.uint8)[bit // 8] ^= 1 << bit % 8
        assert checksums.of({"a": damaged}) != whole
    exchanged = array.copy()
    exchanged[[3, 40]] = exchanged[[40, 3]]
    assert checksums.of({"a": exchanged}) != whole


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_found(dtype, bad):
    good, array = np.ones((300, 200), dtype), np.ones((300, 200), dtype)
    array[250, 7] = bad
    tree = {"good": good, "bad": array, "count": np.int32(2**31 - 1)}
    assert checksums.examined(tree)[1] == ["bad"]
    found = jax.device_get(checksums._device({name: jnp.asarray(leaf) for name, leaf in tree.items()}))
    assert [name for name, sums in found.items() if not sums[2]] == ["bad"]


def test_what_is_not_finite_is_found_in_types_that_no_step_computes_in():
    for dtype in (np.float64, jnp.float8_e5m2):
        tree = {"good": np.ones((3, 4), dtype), "bad": np.asarray([1, np.inf], dtype)}
        assert checksums.examined(tree)[1] == ["bad"]
