"""Cached decoding: prompts are read once, then one token per row with the cached keys and values of both.

The layers are either a list (shallow models: the compiler sees each, nothing is sliced inside the decoding loop) or
stacked along L for a loop over them (deep ones, whose compile time must not grow with depth). Keys and values follow.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from latent_jax.models.qwen2_5_vl.text import TextBlock, TextDecoder
from latent_jax.ops.attention import cached_attention, masked_attention, packed_mask
from latent_jax.ops.norm import rms_norm

# Up to this depth a list of layers compiles in seconds, and on a CPU takes half the time of a loop over them.
UNROLLED_LAYERS = 8


class KVCache(NamedTuple):
    """Rotated keys and values of one layer for U positions of every row; a leading L where layers are stacked."""

    k: Float[Array, "*L R K U H"]
    v: Float[Array, "*L R K U H"]


def layers_of(text: TextDecoder) -> list[TextBlock] | TextBlock:
    """The layers as a list or stacked. Call it outside of the decoding loop: a list is a copy of the weights."""
    depth = text.config.num_hidden_layers
    if depth > UNROLLED_LAYERS:
        return text.blocks
    return [jax.tree.map(lambda stacked, i=i: stacked[i], text.blocks) for i in range(depth)]


def empty(text: TextDecoder, rows: int, places: int) -> list[KVCache] | KVCache:
    """A cache of zeros for `places` tokens of every row."""
    config = text.config
    shape: tuple[int, ...] = (rows, config.num_key_value_heads, places, config.head_size)
    if config.num_hidden_layers > UNROLLED_LAYERS:
        shape = (config.num_hidden_layers, *shape)
        return KVCache(jnp.zeros(shape, text.embed.dtype), jnp.zeros(shape, text.embed.dtype))
    zeros = jnp.zeros(shape, text.embed.dtype)
    return [KVCache(zeros, zeros)] * config.num_hidden_layers


def seen(
    places: Int[Array, "R U"],
    lengths: Int[Array, " R"],
    hidden: Bool[Array, "B T"] | None = None,
    late: Bool[Array, "B T"] | None = None,
) -> Bool[Array, "R U"]:
    """Which tokens of a prompt are visible to its last token and to all tokens generated after it.

    Where the last token is late, so are the generated ones: they see no hidden token.
    """
    real = jnp.arange(places.shape[1]) < lengths[:, None]
    if hidden is None or late is None:
        return real
    return real & ~(late.reshape(-1)[_last(places, lengths)][:, None] & hidden.reshape(-1)[places])


def _last(places: Int[Array, "R U"], lengths: Int[Array, " R"]) -> Int[Array, " R"]:
    return jnp.take_along_axis(places, jnp.maximum(lengths - 1, 0)[:, None], axis=1)[:, 0]


def prefill(
    text: TextDecoder,
    x: Float[Array, "B T D"],
    positions: Int[Array, "B 3 T"],
    segment_ids: Int[Array, "B T"],
    view_ids: Int[Array, "B T"],
    places: Int[Array, "R U"],
    lengths: Int[Array, " R"],
    hidden: Bool[Array, "B T"] | None = None,
    late: Bool[Array, "B T"] | None = None,
) -> tuple[Float[Array, "R D"], list[KVCache] | KVCache]:
    """R prompts, packed into B rows: the final hidden state of each one's last token, and the cache of all its tokens.

    Args:
      places: flat index row * T + t of each prompt's tokens in order; anything behind its length.
      lengths: of the prompts. The hidden state of an empty prompt is undefined.
    """
    B, T, D = x.shape
    angles, mask = text.angles(positions), packed_mask(segment_ids, view_ids, hidden, late)
    last, real = _last(places, lengths), seen(places, lengths, hidden, late)

    def by_prompt(each: Float[Array, "B T K H"]) -> Float[Array, "R K U H"]:
        return jnp.swapaxes(each.reshape(B * T, *each.shape[2:])[places], 1, 2)

    def body(x: Array, block: TextBlock) -> tuple[Array, KVCache]:
        q, k, v = block.qkv(x, angles)
        return block.finish(x, masked_attention(q, k, v, mask)), KVCache(by_prompt(k), by_prompt(v))

    def final(x: Array, block: TextBlock) -> tuple[Array, KVCache]:
        # Only the last token of a prompt needs the rest of the last layer: query, attention and feed-forward.
        _, k, v = block.qkv(x, angles)
        cache = KVCache(by_prompt(k), by_prompt(v))
        x = x.reshape(B * T, D)[last][:, None]
        q, _, _ = block.qkv(x, angles.reshape(B * T, -1)[last][:, None])
        return block.finish(x, cached_attention(q[:, 0], (*cache, real))[:, None]), cache

    layers, depth = layers_of(text), text.config.num_hidden_layers
    if isinstance(layers, list):
        caches: list[KVCache] = []
        for block in layers:
            x, each = (final if len(caches) + 1 == depth else body)(x, block)
            caches.append(each)
        cache: list[KVCache] | KVCache = caches
    else:
        # By index: a stack without its last layer would be a copy of the model.
        at = lambda i: jax.tree.map(lambda stacked: jax.lax.dynamic_index_in_dim(stacked, i, keepdims=False), layers)
        x, cache = jax.lax.scan(lambda x, i: body(x, at(i)), x, jnp.arange(depth - 1))
        x, each = final(x, at(depth - 1))
        cache = jax.tree.map(lambda stacked, one: jnp.concatenate([stacked, one[None]]), cache, each)
    return rms_norm(x[:, 0], text.norm[...], text.config.rms_norm_eps), cache


def step(
    text: TextDecoder,
    layers: list[TextBlock] | TextBlock,
    x: Float[Array, "R D"],
    positions: Int[Array, "R 3"],
    prompts: list[KVCache] | KVCache,
    real: Bool[Array, "R U"],
    recent: list[KVCache] | KVCache,
    n: Int[Array, ""],
) -> tuple[Float[Array, "R D"], list[KVCache] | KVCache]:
    """Reads one token per row: its final hidden state, and `recent` with its keys and values at index n.

    positions: the tokens' M-RoPE positions. real: the prompt tokens that each row sees (`seen`).
    All rows write at the same index n: prompts of different lengths have a cache of their own, so no scatter is needed.
    Raises ValueError where of layers and caches some are lists and some are stacked.
    """
    angles = text.angles(positions[:, :, None])
    written = (jnp.arange(jax.tree.leaves(recent)[0].shape[-2]) <= n)[None]

    def body(x: Array, block: TextBlock, prompt: KVCache, recent: KVCache) -> tuple[Array, KVCache]:
        q, k, v = block.qkv(x[:, None], angles)
        write = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, jnp.swapaxes(new, 1, 2), n, axis=2)
        recent = KVCache(write(recent.k, k), write(recent.v, v))
        heads = cached_attention(q[:, 0], (*prompt, real), (*recent, written))
        return block.finish(x[:, None], heads[:, None])[:, 0], recent

    if isinstance(layers, list) and isinstance(prompts, list) and isinstance(recent, list):
        news = []
        for block, prompt, old in zip(layers, prompts, recent, strict=True):
            x, new = body(x, block, prompt, old)
            news.append(new)
        recent = news
    elif isinstance(layers, TextBlock) and isinstance(prompts, KVCache) and isinstance(recent, KVCache):

        def turn(
            carry: tuple[Array, KVCache], layer: tuple[Array, TextBlock, KVCache]
        ) -> tuple[tuple[Array, KVCache], None]:
            # In the carry and not among the outputs: there it would be copied whole, here it is changed in place.
            x, recent = carry
            i, block, prompt = layer
            old = jax.tree.map(lambda stacked: jax.lax.dynamic_index_in_dim(stacked, i, keepdims=False), recent)
            x, new = body(x, block, prompt, old)
            put = lambda stacked, one: jax.lax.dynamic_update_index_in_dim(stacked, one, i, 0)
            return (x, jax.tree.map(put, recent, new)), None

        numbers = jnp.arange(text.config.num_hidden_layers)
        (x, read), _ = jax.lax.scan(turn, (x, recent), (numbers, layers, prompts))
        recent = read
    else:
        raise ValueError("layers and caches: expected three lists, or all three stacked along L")
    return rms_norm(x, text.norm[...], text.config.rms_norm_eps), recent
