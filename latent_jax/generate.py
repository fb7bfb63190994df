"""KV-cached decoding: a batch of prompts in, token ids out; and the command that answers one prompt.

python -m latent_jax.generate --model=DIR [--image=FILE ...] [--imagine=TEXT] --prompt=TEXT [--max_new_tokens=N]
"""

import argparse
import functools
import sys
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from latent_jax.data.layout import Example
from latent_jax.errors import UserError
from latent_jax.models.qwen2_5_vl.model import Qwen2_5_VL

# Lengths are rounded up to these, so that prompts of many lengths share few compiled programs.
TOKEN_BUCKET = 64
PATCH_BUCKET = 256


class Rows(NamedTuple):
    """Prompts one a row, padded on the right, with the images of all of them in one group."""

    batch: dict[str, Array]
    lengths: Int[Array, " R"]
    next_position: Int[Array, " R"]
    image_patches: int


def one_per_row(examples: Sequence[Example], config) -> Rows:
    """Lays prompts out as rows of a batch with one group.

    Args:
      examples: laid-out prompts; an Imagined part's features follow each other in the order of the examples.
      config: the model's Config.
    """
    unit, window = config.vision.merge_unit, config.vision.window_patches
    slices = [int(np.bincount(e.patch_image).max(initial=0)) for e in examples]
    image_patches = _up(max([window, *slices]), window)
    patches = _up(sum(len(e.patches) for e in examples), PATCH_BUCKET)
    T, R = _up(max(len(e.tokens) for e in examples), TOKEN_BUCKET), len(examples)
    channels = max([e.patches.shape[1] for e in examples if len(e.patches)], default=1)

    rows = {k: np.zeros((1, R, T), np.int32) for k in ("tokens", "segment_ids", "view_ids")}
    rows |= {"feature_index": np.full((1, R, T), -1, np.int32), "positions": np.zeros((1, R, 3, T), np.int32)}
    group = {k: np.zeros((1, patches), np.int32) for k in ("patch_window", "patch_image")}
    group |= {"patches": np.zeros((1, patches, channels), np.uint8)}
    group |= {"patch_positions": np.zeros((1, patches, 2), np.int32)}
    at = images = windows = given = 0
    for r, e in enumerate(examples):
        t, p, m = len(e.tokens), len(e.patches), len(e.patches) // unit
        rows["tokens"][0, r, :t], rows["segment_ids"][0, r, :t], rows["view_ids"][0, r, :t] = e.tokens, 1, e.view_ids
        rows["positions"][0, r, :, :t] = e.positions
        offset = np.where(e.feature_index < m, at // unit, patches // unit + given - m)
        rows["feature_index"][0, r, :t] = np.where(e.feature_index < 0, -1, e.feature_index + offset)
        given += int((e.feature_index >= m).sum())
        if p:
            place = slice(at, at + p)
            group["patches"][0, place], group["patch_positions"][0, place] = _frames(e, channels), e.patch_positions
            group["patch_image"][0, place] = e.patch_image + images
            group["patch_window"][0, place] = e.patch_window + windows
            at, images, windows = at + p, images + e.patch_image.max(), windows + e.patch_window.max()
    lengths = np.array([len(e.tokens) for e in examples], np.int32)
    following = np.array([next_position(e) for e in examples], np.int32)
    return Rows(rows | (group if patches else {}), lengths, following, image_patches)


def next_position(example: Example) -> int:
    """M-RoPE position of the token after the prompt, which ends in text.

    A long video's temporal positions may reach further; `generate` of transformers counts on from the text as well.
    """
    return int(example.positions[0, -1]) + 1


def _frames(example: Example, channels: int) -> np.ndarray:
    """A still's patches, repeated over the frames of a batch that also holds video."""
    p, c = example.patches.shape
    return np.repeat(example.patches.reshape(p, 3, 1, -1), channels // c, axis=2).reshape(p, channels)


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


@functools.partial(jax.jit, static_argnames=("image_patches", "max_new_tokens"))
def decode(
    model: Qwen2_5_VL,
    batch: dict[str, Array],
    given: Float[Array, "X D"],
    lengths: Int[Array, " R"],
    next_positions: Int[Array, " R"],
    eos: Int[Array, " Z"],
    *,
    image_patches: int,
    max_new_tokens: int,
) -> tuple[Int[Array, "R W"], Int[Array, " R"]]:
    """Greedy decoding: (new tokens, how many of them each row has, its end token included).

    Every row has its own length, position and end, so a row's tokens do not depend on its neighbours.
    """
    x = embed(model, batch, given, image_patches)
    R, T = x.shape[1:3]
    cache = model.text.empty_cache(R, T + max_new_tokens)
    place = jnp.arange(T + max_new_tokens)
    mask = jnp.broadcast_to(place <= jnp.arange(T)[:, None], (R, T, T + max_new_tokens))
    hidden, cache = model.text.cached(x[0], batch["positions"][0], cache, jnp.zeros(R, jnp.int32), mask)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    token = jnp.argmax(model.logits(last), axis=-1).astype(jnp.int32)

    def going(carry):
        step, *_, done = carry
        return (step < max_new_tokens) & ~done.all()

    def step(carry):
        n, token, tokens, counts, cache, done = carry
        tokens = tokens.at[:, n].set(jnp.where(done, 0, token))
        counts = counts + ~done
        done = done | jnp.isin(token, eos)
        at = lengths + n
        positions = jnp.broadcast_to((next_positions + n)[:, None, None], (R, 3, 1))
        x = model.text.embed[...][token][:, None]
        hidden, cache = model.text.cached(x, positions, cache, at, (place <= at[:, None])[:, None])
        following = jnp.argmax(model.logits(hidden[:, 0]), axis=-1).astype(jnp.int32)
        return n + 1, following, tokens, counts, cache, done

    tokens = jnp.zeros((R, max_new_tokens), jnp.int32)
    start = (jnp.int32(0), token, tokens, jnp.zeros(R, jnp.int32), cache, jnp.zeros(R, bool))
    _, _, tokens, counts, _, _ = jax.lax.while_loop(going, step, start)
    return tokens, counts


def embed(model: Qwen2_5_VL, batch: dict[str, Array], given: Float[Array, "X D"], image_patches: int):
    """Input embeddings (1, R, T, D): words, visual tokens, and given features such as imagined latents."""
    features = given[None]
    if "patches" in batch:
        merged, _, _ = model.encode(batch, image_patches=image_patches)
        features = jnp.concatenate([merged, features.astype(merged.dtype)], axis=1)
    return model.embed(batch["tokens"], batch["feature_index"], features)


def main() -> None:
    """The command. Only the answer goes to standard output."""
    parser = argparse.ArgumentParser(prog="python -m latent_jax.generate", description="Answers one prompt.")
    parser.add_argument("--model", required=True, help="HF checkpoint directory, hub id or workdir; '' = the tiny one")
    parser.add_argument("--image", action="append", default=[], help="image file; may be given several times")
    parser.add_argument("--imagine", action="append", default=[], help="description of an image to imagine")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--dtype", default=None, help="float32 or bfloat16; default: the checkpoint's")
    arguments = parser.parse_args()
    try:
        import latent_jax

        vlm = latent_jax.load(arguments.model, dtype=arguments.dtype)
        content = [{"type": "image", "image": file} for file in arguments.image]
        content += [{"type": "imagine", "text": text} for text in arguments.imagine]
        content += [{"type": "text", "text": arguments.prompt}]
        print(vlm.generate([[{"role": "user", "content": content}]], max_new_tokens=arguments.max_new_tokens)[0])
    except UserError as problem:
        print(f"error: {problem}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
