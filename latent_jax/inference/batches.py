"""A batch of laid-out prompts, shared among copies of the model: answers, and scores of given ones."""

import functools
import math
import numbers
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Key, UInt32

from latent_jax.data.layout import Example
from latent_jax.data.prompt_batch import bucket, given_features, packed
from latent_jax.errors import UserError
from latent_jax.inference import decode, spans
from latent_jax.inference.decode import Answer, Sampling
from latent_jax.models.heads import LatentVLM
from latent_jax.models.qwen2_5_vl.config import ModelConfig

MOST_NEW_TOKENS = 2**17  # longer than any published model's context


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


def _shares(
    examples: Sequence[Example], given: Float[Array | np.ndarray, "X D"], config: ModelConfig
) -> Callable[[np.ndarray], np.ndarray]:
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
    writing: spans.Writing | None = None,
    inside: Sequence[spans.Given] | None = None,
) -> list[Answer]:
    """Answers to every laid-out prompt, shared among copies of the model, each on its own device.

    At temperature 0 greedy. A prompt's draws come from the seed and the prompt itself: they are the same in any batch,
    and a prompt that is given twice gets two answers. `given`: the features of given Slots, examples in order.
    writing: how the model writes spans; inside: what each prompt's are given (spans.Given), None their own.
    Raises UserError for values out of range.
    """
    check_sampling(temperature, top_p, seed)
    config = models[0].vlm.config
    own, own_features = marks(examples), _shares(examples, given, config)
    inside = [None] * len(examples) if inside is None else inside

    def answer(model: LatentVLM, share: np.ndarray) -> list[Answer]:
        shared = [examples[i] for i in share]
        prompts, sampling, rows = packed(shared, config), None, None
        R = len(prompts.lengths)
        if temperature:
            chosen = np.pad(own[share], ((0, R - len(share)), (0, 0)))
            nucleus = jnp.float32(top_p) if top_p < 1 else None
            sampling = Sampling(keys(np.uint32(seed), chosen), jnp.float32(temperature), nucleus)
        if writing:
            rows = spans.plan(writing, shared, [inside[i] for i in share], R, config.text.hidden_size)
        return decode.generate(
            model, prompts, own_features(share), eos,
            max_new_tokens=max_new_tokens, sampling=sampling, writing=writing, rows=rows,
        )  # fmt: skip

    return divide(models, len(examples), answer)


def scores(
    models: Sequence[LatentVLM], examples: Sequence[Example], given: Float[Array | np.ndarray, "X D"]
) -> list[Float32[np.ndarray, "_"]]:
    """Log likelihoods of the tokens that carry loss in laid-out conversations, in order, teacher-forced; shared among
    copies of the model. `given` as in `answers`."""
    config = models[0].vlm.config
    own_features = _shares(examples, given, config)

    def score(model: LatentVLM, share: np.ndarray) -> list[np.ndarray]:
        prompts = packed([examples[i] for i in share], config)
        features = own_features(share)
        found = _likelihoods(model, prompts.batch, features, image_patches=prompts.image_patches)
        found, spoken = np.asarray(found).reshape(-1), prompts.batch["loss_weights"].reshape(-1) > 0
        own = [places[:length] for places, length in zip(prompts.places, prompts.lengths)]
        return [found[places[spoken[places]]] for places in own[: len(share)]]

    return divide(models, len(examples), score)


@functools.partial(jax.jit, static_argnames="image_patches")
def _likelihoods(
    model: LatentVLM, batch: dict[str, Array], given: Float[Array, "X D"], *, image_patches: int
) -> Float[Array, "1 B T"]:
    """log p(targets[t] | the tokens up to t), where the target is predicted; anything elsewhere."""
    hidden, _ = model.vlm.decode(decode.embed(model.vlm, batch, given, image_patches), batch)

    def one(
        row: tuple[Array, Array],
    ) -> Array:  # a row at a time: the logits of all of them would be the largest array of the program
        logits = jax.nn.log_softmax(model.vlm.logits(row[0]))
        return jnp.take_along_axis(logits, row[1][:, None], axis=-1)[:, 0]

    return jax.lax.map(one, (hidden[0], batch["targets"][0]))[None]


def marks(examples: Sequence[Example]) -> np.ndarray:
    """(R, 2) uint32 that tells a prompt's draws apart: what it says and shows, and how many equal ones stand before."""
    said = [zlib.crc32(e.patches.tobytes(), zlib.crc32(e.tokens.tobytes())) for e in examples]
    before: Counter[int] = Counter()
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
