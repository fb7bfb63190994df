"""Latents inside an answer: which are due in each row, where they stand, and what is fed in their place.

Every row has its own place, so that a row's answer does not depend on its neighbours: some are at words, others at a
latent, in one program of static shapes (methods/contract.py, `Span`).
"""

import math
import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from latent_jax.data.layout import Example
from latent_jax.errors import UserError
from latent_jax.methods.contract import Span
from latent_jax.models.heads import LatentVLM
from latent_jax.models.qwen2_5_vl.config import ModelConfig

# What the spans of an answer are given: None their own latents, () none may be opened, else arrays (count, D).
Given = Sequence[np.ndarray] | None
Written = tuple[np.ndarray, np.ndarray]  # of a span: latents (count, Z), inputs (count, D)


class Writing(NamedTuple):
    """How a model writes spans; static. keep: what it writes is returned."""

    span: Span
    config: Any
    keep: bool = False


class Rows(NamedTuple):
    """What does not change while R rows are answered.

    shape: rows and columns of a span's positions; columns 0: as many latents as `rows`, with the positions of text.
    may_open: spans are allowed. given, number: inputs in the place of the model's own, and of how many spans (0: own);
    further spans take the last.
    """

    shape: Int[Array | np.ndarray, "R 2"]
    may_open: Bool[Array | np.ndarray, " R"]
    given: Float[Array | np.ndarray, "R J S D"] | None
    number: Int[Array | np.ndarray, " R"]


class State(NamedTuple):
    """Where each row stands.

    place: 0 at words, i where the newest token stands for latent i of a span (from 1). opened: spans so far.
    base: M-RoPE position of the newest token; inside a grid, of the grid's first cell.
    hidden: final hidden state of the token before the newest. latents, inputs: of spans so far, where they are kept.
    """

    place: Int[Array, " R"]
    opened: Int[Array, " R"]
    base: Int[Array, " R"]
    hidden: Float[Array, "R D"]
    carry: Any
    latents: Float[Array, "R J S Z"] | None
    inputs: Float[Array, "R J S D"] | None


def plan(writing: Writing, examples: Sequence[Example], given: Sequence[Given], rows: int, width: int) -> Rows:
    """Of prompts and what their spans are given, padded to `rows`; `width` is D.

    Raises UserError where an array has another shape than the prompt's spans.
    """
    span, config = writing.span, writing.config
    most = span.most(config)
    shape, may_open = np.tile(np.array([1, 0], np.int32), (rows, 1)), np.zeros(rows, bool)
    number = np.zeros(rows, np.int32)
    some = any(own is not None and len(own) for own in given)
    arrays = np.zeros((rows if some else 0, span.kept, most, width), np.float32)
    for row, (example, own) in enumerate(zip(examples, given, strict=True)):
        wanted = shape_of(span, example, config)
        shape[row] = (wanted, 0) if isinstance(wanted, int) else wanted
        count = _count(shape[row])
        may_open[row] = own is None or len(own) > 0
        for j, array in enumerate(own or ()):
            if j >= span.kept or np.shape(array) != (count, width) or not _finite(array):
                raise UserError(
                    f"span {j} of a conversation is given an array of shape {np.shape(array)}; expected "
                    f"{(count, width)} finite numbers, in at most {span.kept} spans"
                )
            arrays[row, j, :count] = array
            number[row] = j + 1
    return Rows(shape, may_open, arrays if some else None, number)


def shape_of(span: Span, example: Example, config: Any) -> int | tuple[int, int]:
    """The number of latents of a span in the answer to a prompt, or the rows and columns of their grid.

    Raises UserError where the method gives something else, or more latents than `most`.
    """
    wanted, most = span.shape(example, config), span.most(config)
    sizes = wanted if isinstance(wanted, tuple | list) and len(wanted) == 2 else [wanted]
    if not all(isinstance(size, numbers.Integral) and size >= 1 for size in sizes) or math.prod(sizes) > most:
        raise UserError(f"a span of {wanted} latents; expected 1 to {most}, or rows and columns of so many")
    return (int(sizes[0]), int(sizes[1])) if len(sizes) == 2 else int(sizes[0])


def begin(model: LatentVLM, writing: Writing, base: Int[Array | np.ndarray, " R"], carry: Any) -> State:
    """Before the first token of the answers, whose M-RoPE positions are `base`."""
    R, table = len(base), model.vlm.text.embed[...]
    hidden, zeros = jnp.zeros((R, table.shape[1]), table.dtype), jnp.zeros(R, jnp.int32)
    state = State(zeros, zeros, jnp.asarray(base), hidden, carry, None, None)
    if not writing.keep:
        return state
    latents, inputs, _ = jax.eval_shape(lambda: _feed(model, writing, state))
    room = (R, writing.span.kept, writing.span.most(writing.config))
    empty = lambda like: jnp.zeros((*room, like.shape[-1]), like.dtype)
    return state._replace(latents=empty(latents), inputs=empty(inputs))


def read(
    model: LatentVLM, writing: Writing, rows: Rows, state: State, words: Float[Array, "R D"]
) -> tuple[Float[Array, "R D"], Int[Array, "R 3"], State]:
    """(input embeddings of the newest tokens, their M-RoPE positions, the state with their latents noted).

    words: embeddings of the tokens, which rows inside a span do not take.
    """
    R, inside = len(words), state.place > 0
    empty = jax.eval_shape(lambda: _feed(model, writing, state))
    idle = lambda: (jnp.zeros(empty[0].shape, empty[0].dtype), words, state.carry)
    # A head is not run where all rows are at words.
    latents, inputs, carry = jax.lax.cond(inside.any(), lambda: _feed(model, writing, state), idle)
    i = jnp.maximum(state.place - 1, 0)
    if rows.given is not None:
        j = jnp.clip(state.opened - 1, 0, jnp.maximum(rows.number - 1, 0))
        inputs = jnp.where(rows.number[:, None] > 0, rows.given[jnp.arange(R), j, i].astype(words.dtype), inputs)
    if writing.keep:
        j = jnp.where(inside, state.opened - 1, writing.span.kept)  # out of bounds: dropped
        note = lambda kept, new: kept.at[jnp.arange(R), j, i].set(new, mode="drop")
        state = state._replace(latents=note(state.latents, latents), inputs=note(state.inputs, inputs))
    columns = rows.shape[:, 1]
    across = jnp.stack([jnp.zeros_like(i), i // jnp.maximum(columns, 1), i % jnp.maximum(columns, 1)], axis=1)
    positions = state.base[:, None] + jnp.where((inside & (columns > 0))[:, None], across, 0)
    return jnp.where(inside[:, None], inputs, words), positions, state._replace(carry=carry)


def _feed(model: LatentVLM, writing: Writing, state: State) -> tuple[Array, Array, Any]:
    """(latents, inputs, carry) of the rows that are inside a span; the carry of others is left."""
    inside, words = state.place > 0, model.vlm.text.embed
    latents, inputs, carry = writing.span.feed(
        model, state.hidden, state.carry, jnp.maximum(state.place - 1, 0), writing.config
    )
    keep = lambda new, old: jnp.where(inside.reshape(-1, *[1] * (old.ndim - 1)), new.astype(old.dtype), old)
    return latents, inputs.astype(words.dtype), jax.tree.map(keep, carry, state.carry)


def allowed(config: ModelConfig, rows: Rows, logits: Float[Array, "R V"]) -> Float[Array, "R V"]:
    """The logits without the opening mark in rows that may not open a span."""
    mark = jnp.arange(logits.shape[1]) == config.vision_start_token_id
    return jnp.where(mark & ~rows.may_open[:, None], -jnp.inf, logits)


def by_rule(
    config: ModelConfig,
    writing: Writing,
    rows: Rows,
    tokens: Int[Array, "R W"],
    count: Int[Array, ""],
    chosen: Int[Array, " R"],
) -> Int[Array, " R"]:
    """The chosen tokens, or the opening mark where the method's rule asks for it behind `count` tokens."""
    if writing.span.rule is None:
        return chosen
    due = writing.span.rule(tokens, count, writing.config) & rows.may_open
    return jnp.where(due, config.vision_start_token_id, chosen)


def follow(
    config: ModelConfig,
    rows: Rows,
    state: State,
    hidden: Float[Array, "R D"],
    newest: Int[Array, " R"],
    chosen: Int[Array, " R"],
    done: Bool[Array, " R"],
) -> tuple[Int[Array, " R"], State]:
    """(next tokens, state) once the model has read the newest ones; chosen: what it would say next.

    done: rows whose answers have ended; the model reads on in them, and opens no span.
    """
    place, grid = state.place, rows.shape[:, 1] > 0
    entering = (place == 0) & (newest == config.vision_start_token_id) & rows.may_open & ~done
    last = (place > 0) & (place == jnp.where(grid, rows.shape[:, 0] * rows.shape[:, 1], rows.shape[:, 0]))
    stays = (entering | (place > 0)) & ~last
    token = jnp.where(last, config.vision_end_token_id, jnp.where(stays, config.image_token_id, chosen))
    # A grid's cells count from its first; what follows it stands behind its longer side.
    step = jnp.where(grid & (place > 0), jnp.where(last, rows.shape.max(axis=1), 0), 1)
    state = state._replace(
        place=jnp.where(stays, place + 1, 0), opened=state.opened + entering, base=state.base + step, hidden=hidden
    )
    return token, state


def kept(state: State, rows: Rows, chosen: np.ndarray, owner: np.ndarray) -> dict[int, list[Written]]:
    """Chosen rows of a state -> (latents (count, Z), inputs (count, D)) of their spans, as far as these were written.

    owner: the row of `rows` that each row of the state answers.
    """
    place, opened, latents, inputs = jax.device_get((state.place, state.opened, state.latents, state.inputs))
    found: dict[int, list[Written]] = {}
    for row in chosen.tolist():
        whole = _count(np.asarray(rows.shape)[owner[row]])
        counts = [whole] * int(opened[row])
        if place[row]:
            counts[-1] = int(place[row]) - 1
        # Copies: the arrays of the whole batch need not live as long as one answer.
        found[row] = [
            (latents[row, j, :count].copy(), inputs[row, j, :count].copy())
            for j, count in enumerate(counts[: latents.shape[1]])
        ]
    return found


def room(writing: Writing) -> int:
    """Tokens that the latents and marks of an answer's kept spans take."""
    return writing.span.kept * (writing.span.most(writing.config) + 2)


def words(config: ModelConfig, tokens: Sequence[int]) -> list[int]:
    """The tokens of an answer outside of its spans."""
    found, inside = [], False
    for token in tokens:
        inside = inside or token == config.vision_start_token_id
        if not inside:
            found.append(token)
        inside = inside and token != config.vision_end_token_id
    return found


def counted(config: ModelConfig, tokens: Sequence[int]) -> tuple[int, int]:
    """(spans that an answer opened, spans of these that it closed)."""
    opened = closed = 0
    inside = False
    for token in tokens:
        if token == config.vision_start_token_id:
            opened, inside = opened + 1, True
        elif token == config.vision_end_token_id:
            closed, inside = closed + inside, False
    return opened, closed


def _finite(array: np.ndarray) -> bool:
    try:
        return bool(np.isfinite(array.astype(np.float32)).all())
    except (TypeError, ValueError):  # no numbers
        return False


def _count(shape: Int[np.ndarray, "2"]) -> int:
    rows, columns = map(int, shape)
    return rows * columns if columns else rows
