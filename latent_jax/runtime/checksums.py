"""Checksums of arrays as they are trained: computed where they live, the same on any mesh, in one pass over memory.

The words w_i of an array (its elements' bits in row-major order) give two sums modulo 2^32: of w_i, and of
(2 i + 1) w_i. A change of one word changes both, since odd numbers have inverses; other damage stays unnoticed once in
2^64. The second depends on the order. Terms may be added in any order, so shards on many devices stay where they are.
"""

import concurrent.futures
import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Sums = dict[str, list[int]]
_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint32}
_EXPONENT = {"float32": 0x7F800000, "bfloat16": 0x7F80, "float16": 0x7C00}
_PIECE, _CHUNK = 1 << 24, 1 << 15  # words of a thread's turn, and of one numpy call: that stays in the cache
_ODD = np.arange(1, 2 * _CHUNK + 1, 2, dtype=np.uint32)


def of(tree: Any) -> Sums:
    """Dotted path -> the two sums, for a tree of jax or numpy arrays; of arrays on several hosts, all must ask."""
    return examined(tree)[0]


def examined(tree: Any) -> tuple[Sums, list[str]]:
    """As `of`, and the paths of arrays that hold something that is not finite: in the same pass."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    named = {dotted(path): leaf for path, leaf in leaves}
    far = {path: leaf for path, leaf in named.items() if not _at_hand(leaf)}
    found = jax.device_get(_device(far)) if far else {}
    found |= {path: _host(np.asarray(leaf)) for path, leaf in named.items() if path not in far}
    sums = {path: [int(part) for part in found[path][:2]] for path in named}
    return sums, [path for path in named if not found[path][2]]


def _at_hand(leaf: Any) -> bool:
    """Whether numpy sees it without a copy to speak of: XLA's reductions on a CPU run at a tenth of its speed."""
    if not isinstance(leaf, jax.Array):
        return True
    return leaf.is_fully_addressable and all(device.platform == "cpu" for device in leaf.devices())


@jax.jit
def _device(arrays: dict[str, jax.Array]) -> dict[str, tuple]:
    return {path: (*_sums(array), jnp.isfinite(array).all()) for path, array in arrays.items()}


def _sums(array: jax.Array) -> tuple[jax.Array, jax.Array]:
    array = array.astype(jnp.uint8) if array.dtype == bool else array
    words = jax.lax.bitcast_convert_type(array, _WORDS[array.dtype.itemsize]).astype(jnp.uint32)
    # The row-major place of every word, without a flat copy: a reshape would bring the shards of an array together.
    place, stride = jnp.zeros((), jnp.uint32), 1
    for axis in reversed(range(words.ndim)):
        place = place + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * np.uint32(stride % 2**32)
        stride *= words.shape[axis]
    return words.sum(dtype=jnp.uint32), (words * (2 * place + 1)).sum(dtype=jnp.uint32)


def _host(array: np.ndarray) -> tuple[int, int, bool]:
    array = np.ascontiguousarray(array, array.dtype.newbyteorder("="))
    words = array.reshape(-1).view(_WORDS[array.dtype.itemsize])
    pieces = range(0, len(words), _PIECE)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:  # numpy lets go of the interpreter's lock
        parts = list(pool.map(functools.partial(_piece, words, _EXPONENT.get(array.dtype.name)), pieces))
    plain, odd, finite = zip(*parts, strict=True) if parts else ((), (), ())
    sound = all(finite) and (array.dtype.name in _EXPONENT or _finite(array))
    return sum(plain) % 2**32, sum(odd) % 2**32, sound


def _finite(array: np.ndarray) -> bool:
    """For the types that no step computes in (float64, float8)."""
    return not jnp.issubdtype(array.dtype, jnp.inexact) or bool(np.isfinite(array.astype(np.complex128)).all())


def _piece(words: np.ndarray, exponent: int | None, start: int) -> tuple[int, int, bool]:
    """The sums over a piece, chunk by chunk: that of (2 (at + j) + 1) w is 2 at times the plain sum more than that of
    (2 j + 1) w. What is not finite has every bit of its exponent set."""
    plain, odd, finite = 0, 0, True
    room = np.empty(_CHUNK, np.uint32)
    for at in range(start, min(start + _PIECE, len(words)), _CHUNK):
        part = words[at : at + _CHUNK]
        total = int(part.sum(dtype=np.uint32))
        weighted = np.multiply(part, _ODD[: len(part)], out=room[: len(part)], dtype=np.uint32)
        plain, odd = plain + total, odd + int(weighted.sum(dtype=np.uint32)) + 2 * at * total
        if exponent and finite:
            finite = int((part & words.dtype.type(exponent)).max()) != exponent
    return plain, odd, finite


def dotted(path: tuple[Any, ...]) -> str:
    """A key path of a tree as one name."""
    return ".".join(_key(part) for part in path)


def _key(part: Any) -> str:
    return str(next(getattr(part, name) for name in ("key", "name", "idx") if hasattr(part, name)))
