"""KV-cached decoding of a batch: prompts in, answers out, words and latents side by side."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from latent_jax.data.prompt_batch import PromptBatch, bucket
from latent_jax.inference import spans
from latent_jax.models.heads import LatentVLM
from latent_jax.models.qwen2_5_vl import cached
from latent_jax.models.qwen2_5_vl.cached import KVCache
from latent_jax.models.qwen2_5_vl.model import Qwen2_5_VL
from latent_jax.ops.sampling import greedy, sample

NEW_TOKENS = 16  # the least bucket of max_new_tokens
Cache = list[KVCache] | KVCache  # of every layer, or stacked
# Fewer rows than this are not thinned out when most of them have ended.
LEAST_ROWS = 8


class Sampling(NamedTuple):
    """How tokens are drawn; top_p None: from all of the vocabulary."""

    keys: Key[Array, " R"]
    temperature: Float[Array, ""]
    top_p: Float[Array, ""] | None


class Context(NamedTuple):
    """What does not change while R prompts are answered: their keys and values, which of them answers see, the M-RoPE
    positions of the first new tokens, and how tokens are drawn and spans written."""

    prompts: Cache
    seen: Bool[Array, "R U"]
    next_positions: Int[Array | np.ndarray, " R"]
    sampling: Sampling | None
    span_rows: spans.Rows | None = None


class DecodeState(NamedTuple):
    """The answers so far.

    n: index of the newest token, which the model has not read yet. tokens: those up to it; counts: how many of a row
    belong to its answer. done: rows that have ended. cache: keys and values of the tokens before the newest.
    """

    n: Int[Array, ""]
    token: Int[Array, " R"]
    tokens: Int[Array, "R W"]
    counts: Int[Array, " R"]
    done: Bool[Array, " R"]
    cache: Cache
    inside: spans.State | None = None


class Answer(NamedTuple):
    """Token ids, the end token included; of every kept span its latents (S, Z) in their own space and the inputs (S, D)
    that were fed, as far as they were written."""

    ids: list[int]
    spans: list[spans.Written]


def generate(
    model: LatentVLM,
    prompts: PromptBatch,
    given: Float[Array | np.ndarray, "X D"],
    eos: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    writing: spans.Writing | None = None,
    rows: spans.Rows | None = None,
) -> list[Answer]:
    """Answers to every prompt; greedy without `sampling`, words alone without `writing` and its `rows`.

    One program reads the prompts, one writes the answers; both are compiled for buckets of sizes, of which the exact
    lengths and max_new_tokens are no part. Where three quarters of the rows have ended, the others go on without them.
    A latent counts as a token.
    """
    if (writing is None) != (rows is None):
        raise ValueError("writing and rows: expected both, or neither")
    ends, limit, count = np.array(eos, np.int32), np.int32(max_new_tokens), int((prompts.lengths > 0).sum())
    read = prefill(
        model, prompts.batch, given, prompts.places, prompts.lengths,
        image_patches=prompts.image_patches, writing=writing,
    )  # fmt: skip
    context = Context(read.cache, read.seen, prompts.next_position, sampling, rows)
    capacity = bucket(max_new_tokens, NEW_TOKENS)
    state = begin(model, read.logits, read.carry, context, ends, capacity=capacity, writing=writing)
    answers: list[Answer] = [Answer([], [])] * count
    owner = np.arange(len(prompts.lengths))  # the prompt that each row answers
    while True:
        few = len(owner) // 4 if len(owner) >= LEAST_ROWS else 0
        state = decode(model, context, state, ends, limit, np.int32(few), writing=writing)
        tokens, counts, done = jax.device_get((state.tokens, state.counts, state.done))
        last = done.all() or int(state.n) + 1 >= max_new_tokens
        chosen = np.argsort(done, kind="stable")[:few]
        leaving = np.arange(len(owner)) if last else np.setdiff1d(np.arange(len(owner)), chosen)
        kept: dict[int, list[spans.Written]] = {}
        if writing and writing.keep and rows is not None and state.inside is not None:
            kept = spans.kept(state.inside, rows, leaving, owner)
        for row in leaving.tolist():
            if owner[row] < count:
                answers[owner[row]] = Answer(tokens[row, : counts[row]].tolist(), kept.get(row, []))
        if last:
            return answers
        # Those that go on, and some that have ended to make up the number.
        owner, (context, state) = owner[chosen], keep_rows(context, state, chosen)


class Read(NamedTuple):
    """Prompts that the model has read: fp32 logits of each one's first new token, what the layers keep of it, which of
    it answers see, and what the method keeps of it for spans."""

    logits: Float[Array, "R V"]
    cache: Cache
    seen: Bool[Array, "R U"]
    carry: object


@functools.partial(jax.jit, static_argnames=("image_patches", "writing"))
def prefill(
    model: LatentVLM,
    batch: dict[str, Array],
    given: Float[Array, "X D"],
    places: Int[Array, "R U"],
    lengths: Int[Array, " R"],
    *,
    image_patches: int,
    writing: spans.Writing | None = None,
) -> Read:
    """Reads the prompts; `places` and `lengths` as in PromptBatch, `given` as in `embed`."""
    vlm = model.vlm
    merged = visual(vlm, batch, image_patches)
    x = join(vlm, batch, given, merged)
    positions, segment_ids, view_ids = (batch[name][0] for name in ("positions", "segment_ids", "view_ids"))
    masks = {name: batch[name][0] for name in ("hidden", "late") if name in batch}
    hidden, cache = cached.prefill(vlm.text, x[0], positions, segment_ids, view_ids, places, lengths, **masks)
    carry = writing.span.start(model, batch, merged, writing.config) if writing else None
    return Read(vlm.logits(hidden), cache, cached.seen(places, lengths, **masks), carry)


@functools.partial(jax.jit, static_argnames=("capacity", "writing"))
def begin(
    model: LatentVLM,
    logits: Float[Array, "R V"],
    carry: object,
    context: Context,
    eos: Int[Array, " _"],
    *,
    capacity: int,
    writing: spans.Writing | None = None,
) -> DecodeState:
    """Every row's first token, with room for `capacity` of them."""
    R = len(context.seen)
    state = DecodeState(
        n=jnp.int32(-1),
        token=jnp.zeros(R, jnp.int32),
        tokens=jnp.zeros((R, capacity), jnp.int32),
        counts=jnp.zeros(R, jnp.int32),
        done=~context.seen.any(axis=1),
        cache=cached.empty(model.vlm.text, R, capacity),
        inside=spans.begin(model, writing, context.next_positions, carry) if writing else None,
    )
    return _note(state, _choose(model, context, writing, logits, state), eos)


@functools.partial(jax.jit, donate_argnames="state", static_argnames="writing")
def decode(
    model: LatentVLM,
    context: Context,
    state: DecodeState,
    eos: Int[Array, " _"],
    limit: Int[Array, ""],
    few: Int[Array, ""],
    *,
    writing: spans.Writing | None = None,
) -> DecodeState:
    """Goes on until `limit` tokens are written or at most `few` rows are left that have not ended.

    Every row has its own length, position, key, span and end, so a row's tokens do not depend on its neighbours.
    """
    text, config, rows = model.vlm.text, model.vlm.config, context.span_rows
    layers, table = cached.layers_of(text), text.embed[...]

    def going(state: DecodeState) -> Bool[Array, ""]:
        return (state.n + 1 < limit) & ((~state.done).sum() > few)

    def turn(state: DecodeState) -> DecodeState:
        n, newest, x = state.n, state.token, table[state.token]
        inside = state.inside
        if writing and rows is not None and inside is not None:
            x, positions, inside = spans.read(model, writing, rows, inside, x)
        else:
            positions = jnp.broadcast_to((context.next_positions + n)[:, None], (len(x), 3))
        hidden, cache = cached.step(text, layers, x, positions, context.prompts, context.seen, state.cache, n)
        token = _choose(model, context, writing, model.vlm.logits(hidden), state)
        if rows is not None and inside is not None:
            token, inside = spans.follow(config, rows, inside, hidden, newest, token, state.done)
        return _note(state._replace(cache=cache, inside=inside), token, eos)

    return jax.lax.while_loop(going, turn, state)


def _choose(
    model: LatentVLM,
    context: Context,
    writing: spans.Writing | None,
    logits: Float[Array, "R V"],
    state: DecodeState,
) -> Int[Array, " R"]:
    """Token n + 1 of every row, were it at words."""
    config, n, rows = model.vlm.config, state.n + 1, context.span_rows
    if rows is not None:
        logits = spans.allowed(config, rows, logits)
    if context.sampling is None:
        token = greedy(logits)
    else:
        keys = jax.vmap(jax.random.fold_in, (0, None))(context.sampling.keys, n)
        token = sample(logits, keys, context.sampling.temperature, context.sampling.top_p)
    if writing is None or rows is None:
        return token
    return spans.by_rule(config, writing, rows, state.tokens, n, token)


def _note(state: DecodeState, token: Int[Array, " R"], eos: Int[Array, " _"]) -> DecodeState:
    """Writes down token n + 1 of the rows that have not ended before it."""
    n, done = state.n + 1, state.done
    tokens = jax.lax.dynamic_update_slice_in_dim(state.tokens, jnp.where(done, 0, token)[:, None], n, axis=1)
    counts = state.counts + ~done
    return state._replace(n=n, token=token, tokens=tokens, counts=counts, done=done | jnp.isin(token, eos))


@jax.jit
def keep_rows(context: Context, state: DecodeState, rows: Int[Array, " _"]) -> tuple[Context, DecodeState]:
    """Only these rows."""

    def cache(kept: Cache) -> Cache:  # stacked layers stand before the rows
        return jax.tree.map(lambda array: jnp.take(array, rows, axis=array.ndim - 4), kept)

    take = lambda tree: jax.tree.map(lambda array: array[rows], tree)
    sampling = context.sampling and context.sampling._replace(keys=context.sampling.keys[rows])
    context = Context(
        cache(context.prompts), context.seen[rows], context.next_positions[rows], sampling, take(context.span_rows)
    )
    own = {name: take(getattr(state, name)) for name in ("token", "tokens", "counts", "done", "inside")}
    return context, state._replace(**own, cache=cache(state.cache))


def embed(
    model: Qwen2_5_VL, batch: dict[str, Array], given: Float[Array, "X D"], image_patches: int
) -> Float[Array, "1 B T D"]:
    """Input embeddings: words, visual tokens, and given features such as imagined latents."""
    return join(model, batch, given, visual(model, batch, image_patches))


def visual(model: Qwen2_5_VL, batch: dict[str, Array], image_patches: int) -> Float[Array, "1 M D"] | None:
    """The merged visual tokens of all prompts; None where none shows an image."""
    return model.encode(batch, image_patches=image_patches)[0] if batch["patches"].shape[1] else None


def join(
    model: Qwen2_5_VL, batch: dict[str, Array], given: Float[Array, "X D"], merged: Float[Array, "1 M D"] | None
) -> Float[Array, "1 B T D"]:
    """Input embeddings from merged visual tokens and given features."""
    features = given[None]
    if merged is not None:
        features = jnp.concatenate([merged, features.astype(merged.dtype)], axis=1)
    return model.embed(batch["tokens"], batch["feature_index"], features if features.shape[1] else None)
