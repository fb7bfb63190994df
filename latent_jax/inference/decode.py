"""KV-cached decoding: a batch of prompts in, token ids out."""

import functools
import math
import numbers
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Key, UInt32

from latent_jax.data.layout import Example
from latent_jax.data.prompt_batch import PromptBatch, bucket, given_features, packed
from latent_jax.data.prompt_batch import one_per_row as one_per_row
from latent_jax.errors import UserError
from latent_jax.models.heads import LatentVLM
from latent_jax.models.qwen2_5_vl import cached
from latent_jax.models.qwen2_5_vl.cached import Memory
from latent_jax.models.qwen2_5_vl.model import Qwen2_5_VL
from latent_jax.ops.sampling import greedy, sample

NEW_TOKENS = 16  # the least bucket of max_new_tokens
MOST_NEW_TOKENS = 2**17  # longer than any published model's context
# Fewer rows than this are not thinned out when most of them have ended.
LEAST_ROWS = 8


class Sampling(NamedTuple):
    """How tokens are drawn; top_p None: from all of the vocabulary."""

    keys: Key[Array, " R"]
    temperature: Float[Array, ""]
    top_p: Float[Array, ""] | None


def marks(examples: Sequence[Example]) -> np.ndarray:
    """(R, 2) uint32 that tells a prompt's draws apart: what it says and shows, and how many equal ones stand before."""
    said, before = [zlib.crc32(e.patches.tobytes(), zlib.crc32(e.tokens.tobytes())) for e in examples], Counter()
    found = np.zeros((len(said), 2), np.uint32)
    for row, mark in zip(found, said):
        row[:] = mark, before[mark]
        before[mark] += 1
    return found


def check_new_tokens(value: int) -> int:
    """`value` as an int. Raises UserError where it is none, or out of range: memory for so many tokens is kept."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not 1 <= value <= MOST_NEW_TOKENS:
        raise UserError(f"max_new_tokens: got {value!r:.100}, expected an integer from 1 to {MOST_NEW_TOKENS}")
    return int(value)


def check_sampling(temperature: float, top_p: float, seed: int) -> None:
    """Raises UserError for values of another type or out of range."""
    for name, value in (("temperature", temperature), ("top_p", top_p)):
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise UserError(f"{name}: got {value!r:.100}, expected a number")
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral):
        raise UserError(f"seed: got {seed!r:.100}, expected an integer from 0 to {2**32 - 1}")
    if not 0 <= temperature < math.inf:
        raise UserError(f"temperature: got {temperature}, expected a number of at least 0 (0 = greedy)")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p: got {top_p}, expected a number above 0 and at most 1 (1 = the whole vocabulary)")
    if not 0 <= seed < 2**32:
        raise UserError(f"seed: got {seed}, expected an integer from 0 to {2**32 - 1}")


@jax.jit
def keys(seed: UInt32[Array, ""], marks: UInt32[Array, "R 2"]) -> Key[Array, " R"]:
    """A key for every prompt, of the seed and of its own marks."""
    key = jax.random.key(seed)
    return jax.vmap(lambda mark: jax.random.fold_in(jax.random.fold_in(key, mark[0]), mark[1]))(marks)


class Context(NamedTuple):
    """What every row goes on from; it does not change."""

    prompts: list[Memory] | Memory
    seen: Bool[Array, "R U"]
    next_positions: Int[Array, " R"]
    sampling: Sampling | None


class Written(NamedTuple):
    """The answers so far: `n` + 1 tokens of every row that is not `done`, the newest one not yet read by the model."""

    n: Int[Array, ""]
    token: Int[Array, " R"]
    tokens: Int[Array, "R W"]
    counts: Int[Array, " R"]
    done: Bool[Array, " R"]
    recent: list[Memory] | Memory


def divide(models: Sequence[LatentVLM], count: int, run: Callable[[LatentVLM, np.ndarray], list]) -> list:
    """What `run` gives for `count` prompts, shared among copies of a model, each on its own device.

    run: (a copy, numbers of its prompts, ascending) -> what it gives for each of them. In threads: a CPU device
    computes in the thread that calls it.
    """
    models = models[:count]
    if len(models) == 1:
        return run(models[0], np.arange(count))
    # Shuffled: prompts with long answers often stand side by side, or at every so many-th place.
    order = np.random.default_rng(0).permutation(count)
    shares = [np.sort(order[first :: len(models)]) for first in range(len(models))]
    with ThreadPoolExecutor(len(models)) as pool:
        found = pool.map(run, models, shares)
        pairs = dict(pair for share, each in zip(shares, found) for pair in zip(share.tolist(), each, strict=True))
    return [pairs[i] for i in range(count)]


def _shares(examples: Sequence[Example], given, config) -> Callable[[np.ndarray], np.ndarray]:
    """Numbers of examples -> the features given with these, of which `given` holds all, padded to a bucket."""
    outside = np.asarray(given)
    ends = np.cumsum([0, *(given_features(example, config) for example in examples)])

    def of(share: np.ndarray) -> np.ndarray:
        features = np.concatenate([outside[ends[i] : ends[i + 1]] for i in share])
        return np.pad(features, ((0, bucket(len(features)) - len(features)), (0, 0)))

    return of


def answers(
    models: Sequence[LatentVLM],
    examples: Sequence[Example],
    given: Float[Array | np.ndarray, "X D"],
    eos: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[list[int]]:
    """New token ids of every laid-out prompt, shared among copies of the model, each on its own device.

    At temperature 0 greedy. A prompt's draws come from the seed and the prompt itself: they are the same in any batch,
    and a prompt that is given twice gets two answers. `given`: the features of given Slots, examples in order.
    Raises UserError for values out of range.
    """
    check_sampling(temperature, top_p, seed)
    config = models[0].vlm.config
    own = marks(examples)
    own_features = _shares(examples, given, config)

    def answer(model: LatentVLM, share: np.ndarray) -> list[list[int]]:
        rows, sampling = packed([examples[i] for i in share], config), None
        features = own_features(share)
        if temperature:
            chosen = np.pad(own[share], ((0, len(rows.lengths) - len(share)), (0, 0)))
            nucleus = np.float32(top_p) if top_p < 1 else None
            sampling = Sampling(keys(np.uint32(seed), chosen), np.float32(temperature), nucleus)
        return generate(model, rows, features, eos, max_new_tokens=max_new_tokens, sampling=sampling)

    return divide(models, len(examples), answer)


def scores(
    models: Sequence[LatentVLM], examples: Sequence[Example], given: Float[Array | np.ndarray, "X D"]
) -> list[Float32[np.ndarray, "_"]]:
    """Log likelihoods of the tokens that carry loss in laid-out conversations, in order, teacher-forced; shared among
    copies of the model. `given` as in `answers`."""
    config = models[0].vlm.config
    own_features = _shares(examples, given, config)

    def score(model: LatentVLM, share: np.ndarray) -> list[np.ndarray]:
        rows = packed([examples[i] for i in share], config)
        features = own_features(share)
        found = np.asarray(_likelihoods(model, rows.batch, features, image_patches=rows.image_patches)).reshape(-1)
        spoken = rows.batch["loss_weights"].reshape(-1) > 0
        own = [places[:length] for places, length in zip(rows.places, rows.lengths)]
        return [found[places[spoken[places]]] for places in own[: len(share)]]

    return divide(models, len(examples), score)


@functools.partial(jax.jit, static_argnames="image_patches")
def _likelihoods(model: LatentVLM, batch, given, *, image_patches: int) -> Float[Array, "1 B T"]:
    """log p(targets[t] | what stands up to t), where the target is predicted; else anything."""
    hidden, _ = model.vlm.decode(embed(model.vlm, batch, given, image_patches), batch)
    # A row at a time: the logits of all of them would be the largest array of the program.
    one = lambda row: jnp.take_along_axis(jax.nn.log_softmax(model.vlm.logits(row[0])), row[1][:, None], -1)[:, 0]  # noqa: E731
    return jax.lax.map(one, (hidden[0], batch["targets"][0]))[None]


def generate(
    model: LatentVLM,
    rows: PromptBatch,
    given: Float[Array | np.ndarray, "X D"],
    eos: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
) -> list[list[int]]:
    """New token ids of every prompt, its end token included. Greedy without `sampling`.

    One program reads the prompts, one writes the answers; both are compiled for buckets of sizes, of which the exact
    lengths and max_new_tokens are no part. Where three quarters of the rows have ended, the others go on without them.
    """
    ends, limit, prompts = np.array(eos, np.int32), np.int32(max_new_tokens), int((rows.lengths > 0).sum())
    logits, memory, seen = prefill(
        model, rows.batch, given, rows.places, rows.lengths, image_patches=rows.image_patches
    )
    context = Context(memory, seen, rows.next_position, sampling)
    written = begin(model, logits, context, ends, capacity=bucket(max_new_tokens, NEW_TOKENS))
    answers: list[list[int]] = [[]] * prompts
    owner = np.arange(len(rows.lengths))  # the prompt that each row answers
    while True:
        few = len(owner) // 4 if len(owner) >= LEAST_ROWS else 0
        written = decode(model, context, written, ends, limit, np.int32(few))
        tokens, counts, done = jax.device_get((written.tokens, written.counts, written.done))
        for row, prompt in enumerate(owner):
            if prompt < prompts:
                answers[prompt] = tokens[row, : counts[row]].tolist()
        if done.all() or int(written.n) + 1 >= max_new_tokens:
            return answers
        # Those that go on, and some that have ended to make up the number.
        chosen = np.argsort(done, kind="stable")[:few]
        owner, (context, written) = owner[chosen], take(context, written, chosen)


@functools.partial(jax.jit, static_argnames="image_patches")
def prefill(
    model: LatentVLM,
    batch: dict[str, Array],
    given: Float[Array, "X D"],
    places: Int[Array, "R U"],
    lengths: Int[Array, " R"],
    *,
    image_patches: int,
) -> tuple[Float[Array, "R V"], list[Memory] | Memory, Bool[Array, "R U"]]:
    """(fp32 logits of each prompt's first new token, what the layers keep of the prompts, which of it answers see)."""
    vlm = model.vlm
    x = embed(vlm, batch, given, image_patches)
    rows = (batch[name][0] for name in ("positions", "segment_ids", "view_ids"))
    masks = {name: batch[name][0] for name in ("hidden", "late") if name in batch}
    hidden, memory = cached.prefill(vlm.text, x[0], *rows, places, lengths, **masks)
    return vlm.logits(hidden), memory, cached.seen(places, lengths, **masks)


@functools.partial(jax.jit, static_argnames="capacity")
def begin(model: LatentVLM, logits: Float[Array, "R V"], context: Context, eos: Int[Array, " Z"], *, capacity: int):
    """Every row's first token, with room for `capacity` of them."""
    R = len(context.seen)
    token = _choose(logits, context.sampling, 0)
    empty = Written(
        jnp.int32(0),
        token,
        jnp.zeros((R, capacity), jnp.int32),
        jnp.zeros(R, jnp.int32),
        ~context.seen.any(axis=1),
        cached.empty(model.vlm.text, R, capacity),
    )
    return _note(empty, token, eos)


@functools.partial(jax.jit, donate_argnames="written")
def decode(
    model: LatentVLM,
    context: Context,
    written: Written,
    eos: Int[Array, " Z"],
    limit: Int[Array, ""],
    few: Int[Array, ""],
) -> Written:
    """Goes on until `limit` tokens are written or at most `few` rows are left that have not ended.

    Every row has its own length, position, key and end, so a row's tokens do not depend on its neighbours.
    """
    text = model.vlm.text
    layers, table = cached.layers_of(text), text.embed[...]

    def going(written: Written):
        return (written.n + 1 < limit) & ((~written.done).sum() > few)

    def turn(written: Written):
        n, token = written.n, written.token
        hidden, recent = cached.step(
            text,
            layers,
            table[token],
            context.next_positions + n,
            context.prompts,
            context.seen,
            written.recent,
            n,
        )
        token = _choose(model.vlm.logits(hidden), context.sampling, n + 1)
        return _note(written._replace(n=n + 1, token=token, recent=recent), token, eos)

    return jax.lax.while_loop(going, turn, written)


def _choose(logits: Float[Array, "R V"], sampling: Sampling | None, n) -> Int[Array, " R"]:
    """Token n of every row."""
    if sampling is None:
        return greedy(logits)
    keys = jax.vmap(jax.random.fold_in, (0, None))(sampling.keys, n)
    return sample(logits, keys, sampling.temperature, sampling.top_p)


def _note(written: Written, token: Int[Array, " R"], eos: Int[Array, " Z"]) -> Written:
    """Writes down token n of the rows that have not ended before it."""
    n, done = written.n, written.done
    tokens = jax.lax.dynamic_update_slice_in_dim(written.tokens, jnp.where(done, 0, token)[:, None], n, axis=1)
    return written._replace(tokens=tokens, counts=written.counts + ~done, done=done | jnp.isin(token, eos))


@jax.jit
def take(context: Context, written: Written, rows: Int[Array, " R2"]) -> tuple[Context, Written]:
    """Only these rows."""

    def memory(kept):
        return jax.tree.map(lambda array: jnp.take(array, rows, axis=array.ndim - 4), kept)

    sampling = context.sampling and context.sampling._replace(keys=context.sampling.keys[rows])
    context = Context(memory(context.prompts), context.seen[rows], context.next_positions[rows], sampling)
    own = {name: getattr(written, name)[rows] for name in ("token", "tokens", "counts", "done")}
    return context, written._replace(**own, recent=memory(written.recent))


def embed(model: Qwen2_5_VL, batch: dict[str, Array], given: Float[Array, "X D"], image_patches: int):
    """Input embeddings (1, B, T, D): words, visual tokens, and given features such as imagined latents."""
    features = given[None]
    if batch["patches"].shape[1]:
        merged, _, _ = model.encode(batch, image_patches=image_patches)
        features = jnp.concatenate([merged, features.astype(merged.dtype)], axis=1)
    return model.embed(batch["tokens"], batch["feature_index"], features if features.shape[1] else None)
