"""Do the latents matter? An evaluation again with something else in their place, compared question by question.

Where noise, a constant or another question's latents do as well as the model's own, the answers do not come from them.
What is put there are arrays of input embeddings, built here, whatever method made the latents.
"""

import dataclasses
import itertools
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Float

from latent_jax.analysis.geometry import pairwise_cosine
from latent_jax.benchmarks.items import Item
from latent_jax.config.evaluation import LATENTS, Evaluation
from latent_jax.errors import UserError
from latent_jax.evaluation.answering import replies
from latent_jax.evaluation.paired import compare
from latent_jax.inference.prompts import Thought
from latent_jax.runtime import files

if TYPE_CHECKING:
    from latent_jax.inference.vlm import VLM

SAMPLE = 256  # questions whose latents are looked at, spread over all
BATCH = 32
_TRIED = 8  # questions after a donor that cannot be shown, before its taker is skipped


def run(config: Evaluation, directory: Path, latents: Mapping[str, float], evaluate: Callable) -> dict:
    """Evaluates with every intervention in `directory`/latents_NAME, and writes `directory`/interventions.json.

    latents: `geometry` of the model's own. evaluate: (config, directory) -> the results of one evaluation.
    Returns {"latents", "own": percent, "interventions": {name: compare's numbers, own as a}}. All of it resumes.
    """
    found: dict = {"latents": dict(latents), "interventions": {}}
    if not latents["count"]:  # nothing to replace
        files.write_text(directory / "interventions.json", json.dumps(found, indent=2) + "\n")
        print("no reply to a sample of the questions has latents: there is nothing to replace")
        return found
    for name in [name for name in LATENTS[1:] if name != "donor" or config.evaluate.donors]:
        donors = config.evaluate.donors if name == "donor" else ""
        settings = dataclasses.replace(config.evaluate, latents=name, interventions=False, donors=donors)
        place = directory / f"latents_{name}"
        evaluate(dataclasses.replace(config, evaluate=settings), place)
        found["interventions"][name] = compare(directory, place, config.seed)
    found["own"] = found["interventions"][LATENTS[1]]["a"]
    files.write_text(directory / "interventions.json", json.dumps(found, indent=2) + "\n")
    print("\n".join(table(found)))
    return found


class Latents(NamedTuple):
    """The latents of one answer: of the imagine parts before it and of the spans inside it, with how many spans were
    opened and closed."""

    before: list[Thought]
    inside: list[Thought]
    opened: int = 0
    closed: int = 0


class Moments(NamedTuple):
    """Of the inputs of a sample of thoughts: the mean of every slot, the deviation of every channel of a slot around
    it. Where thoughts have different sizes, of all slots together (M = 1)."""

    mean: Float[np.ndarray, "M D"]
    deviation: Float[np.ndarray, "M D"]


def observed(vlm: "VLM", conversations: Sequence[list[dict]], tokens: int) -> list[Latents]:
    """The model's own latents in these conversations and in its answers of at most `tokens` words."""
    before = vlm.think(conversations)
    if not vlm.writes:
        return [Latents(list(own), []) for own in before]
    given = [[thought.inputs for thought in own] for own in before]
    replies = vlm.reply(conversations, tokens + vlm.span_room, thoughts=given, keep=True)
    return [
        Latents(list(own), [span for span in reply.spans if len(span.inputs)], reply.opened, reply.closed)
        for own, reply in zip(before, replies, strict=True)
    ]


def moments(thoughts: Sequence[Thought]) -> Moments | None:
    """Of a sample; None of none."""
    if not thoughts:
        return None
    inputs = [np.asarray(thought.inputs, np.float64) for thought in thoughts]
    whole = len({each.shape for each in inputs}) == 1
    stacked = np.stack(inputs) if whole else np.concatenate(inputs)[:, None]
    return Moments(stacked.mean(0).astype(np.float32), stacked.std(0).astype(np.float32))


def sender(
    config: Evaluation,
    vlm: "VLM",
    items: Sequence[Item],
    show: Callable[[Sequence[Item]], list[list[dict]]],
    tokens: int,
) -> Callable[[Sequence[Item]], list[str]]:
    """Items -> the replies to them with `config.evaluate.latents` in the place of their latents.

    items: all questions of the split, of which donors are taken. show: items -> conversations, with imagine parts where
    the model thinks before it answers. A question's replacement depends on the split, the seed and the question itself,
    never on its batch. A donor that cannot be shown gives way to the next question that can.
    """
    name, seed = config.evaluate.latents, config.seed
    partners = donors(config, items) if name in ("shuffled", "donor") else {}
    known: tuple[Moments | None, Moments | None] = (None, None)
    if name in ("mean", "noise"):
        sample = _sample(vlm, show(spread(items)), tokens)
        known = (
            moments([thought for own in sample for thought in own.before]),
            moments([thought for own in sample for thought in own.inside]),
        )
    places = {item.id: place for place, item in enumerate(items)}

    def lent(batch: Sequence[Item]) -> list[Latents]:
        first = [partners[item.id] for item in batch]
        found = []
        for item, donor, own in zip(batch, first, _observed(vlm, show(first), tokens), strict=True):
            after = (items[(places[donor.id] + more) % len(items)] for more in range(1, _TRIED + 1))
            tried = itertools.chain([own], (_observed(vlm, show([other]), tokens)[0] for other in after))
            chosen = next((each for each in tried if each and _any(vlm, each)), None)
            if chosen is None and _any(vlm, observed(vlm, show([item]), tokens)[0]):
                raise UserError(f"question {item.id!r:.100}: no donor of latents can be shown")
            found.append(chosen or Latents([], []))
        return found

    def send(batch: Sequence[Item]) -> list[str]:
        shown = show(batch)
        if name == "none":
            empty: list[tuple] = [()] * len(batch)
            return replies(vlm, shown, tokens, thoughts=empty, spans=empty, seed=seed)
        if partners:
            given = [tuple([each.inputs for each in some] for some in (own.before, own.inside)) for own in lent(batch)]
        else:
            given = [
                tuple(
                    [replaced(name, each.inputs, moment, seed) for each in some]
                    for some, moment in zip((own.before, own.inside), known, strict=True)
                )
                for own in observed(vlm, shown, tokens)
            ]
        # Of a donor's span of another size, latents at the same share of it; one that was cut short is drawn out.
        sizes = vlm.span_counts(shown) if vlm.writes else [0] * len(batch)
        inside = [some for _, some in given]
        spans = [[_stretched(each, size) for each in some] or None for some, size in zip(inside, sizes, strict=True)]
        thoughts = [before for before, _ in given]
        return replies(vlm, shown, tokens, thoughts=thoughts, spans=spans, seed=seed)

    return send


def _any(vlm: "VLM", own: Latents) -> bool:
    return bool(own.inside if vlm.writes else own.before)


def _stretched(inputs: Float[np.ndarray, "M D"], size: int) -> Float[np.ndarray, "X D"]:
    return inputs if len(inputs) == size else inputs[np.arange(size) * len(inputs) // size]


def replaced(name: str, own: Float[np.ndarray, "M D"], known: Moments | None, seed: int) -> Float[np.ndarray, "M D"]:
    """What stands in the place of a question's own thought.

    zero: zeros. mean: the mean over questions. noise: draws with the mean and deviation over questions. permuted: its
    own, slots in another order. Draws are of the seed and the thought itself.
    """
    if name == "zero":
        return np.zeros_like(own)
    if known is None and name in ("mean", "noise"):
        raise UserError(f"config.evaluate.latents={name}: no reply to a sample of the questions has latents")
    if name == "mean" and known is not None:
        return _stretched(known.mean, len(own)).astype(own.dtype)
    rng = np.random.default_rng([seed, zlib.crc32(np.ascontiguousarray(own).view(np.uint8).data)])
    if name == "noise" and known is not None:
        mean, deviation = (_stretched(each, len(own)) for each in known)
        return (mean + deviation * rng.standard_normal(own.shape, np.float32)).astype(own.dtype)
    if name == "permuted":
        order = rng.permutation(len(own))
        return own[order if len(own) == 1 or (order != np.arange(len(own))).any() else np.roll(order, 1)]
    raise ValueError(f"{name!r} of the moments {known}")


def donors(config: Evaluation, items: Sequence[Item]) -> dict[str, Item]:
    """Question id -> the question whose latents it gets: the one half the split away (neighbours may ask about one
    image), or what the file of `config.evaluate.donors` says. Raises UserError where there is none."""
    if config.evaluate.latents == "shuffled":
        if len(items) < 2:
            raise UserError("config.evaluate.latents: 'shuffled' with one question; expected at least two")
        return {item.id: items[(place + len(items) // 2) % len(items)] for place, item in enumerate(items)}
    file, known = config.evaluate.donors, {item.id: item for item in items}
    found = files.read_json(file, dict, "question id -> id of its donor")
    for item in items:
        if not isinstance(found.get(item.id), str) or found[item.id] not in known:
            raise UserError(
                f"{file}: question {item.id!r:.100} has the donor {found.get(item.id)!r:.100}, expected the id of a "
                "question of the split"
            )
    return {name: known[donor] for name, donor in found.items() if name in known}


def spread(items: Sequence[Item]) -> list[Item]:
    """At most SAMPLE of them, evenly spread."""
    count = min(SAMPLE, len(items))
    return [items[place * len(items) // count] for place in range(count)]


def geometry(vlm: "VLM", conversations: Sequence[list[dict]], tokens: int) -> dict[str, float]:
    """Of the latents before or inside the answers to these conversations: how alike those of different ones are (cosine
    of all slots together; as they are, and less their mean), their norm (over that of the dataset's true ones too,
    where the head knows it), and the shares of answers that open no span of latents, or leave one open (0 where latents
    are asked for in the prompt)."""
    sample = _sample(vlm, conversations, tokens)
    first = [(own.inside or own.before)[:1] for own in sample]
    found: dict[str, float] = {
        "count": sum(map(len, first)),
        "never_opened": sum(not own.opened for own in sample) / len(sample) if vlm.writes else 0.0,
        "never_closed": sum(own.closed < own.opened for own in sample) / len(sample),
    }
    arrays = [each.latents.astype(np.float64) for some in first for each in some]
    if len(arrays) < 2:
        return found
    whole = len({each.shape for each in arrays}) == 1
    latents = np.stack(arrays if whole else [each.mean(0, keepdims=True) for each in arrays])
    norm, head = np.sqrt(np.mean([(each**2).sum(-1).mean() for each in arrays])), vlm.model.head
    flat = lambda x: x.reshape(len(x), -1)
    found |= {
        "pairwise_cosine": pairwise_cosine(flat(latents)),
        "pairwise_cosine_centred": pairwise_cosine(flat(latents - latents.mean(0))),
        "norm": float(norm),
    }
    if hasattr(head, "mean") and hasattr(head, "scale"):
        mean, scale = (np.asarray(array[...], np.float64) for array in (head.mean, head.scale))
        found["norm_ratio"] = float(norm / np.sqrt((mean**2 + scale**2).sum()))
    return found


def _sample(vlm: "VLM", conversations: Sequence[list[dict]], tokens: int) -> list[Latents]:
    """The latents of those that can be shown. Raises UserError where none can."""
    found = [own for own in _observed(vlm, conversations, tokens) if own is not None]
    if not found:
        raise UserError(f"none of {len(conversations)} questions can be shown, so nothing is known of their latents")
    return found


def _observed(vlm: "VLM", conversations: Sequence[list[dict]], tokens: int) -> list[Latents | None]:
    """As `observed`, in batches; None for a conversation that cannot be shown, such as one with a broken image."""
    found: list[Latents | None] = []
    for at in range(0, len(conversations), BATCH):
        batch = conversations[at : at + BATCH]
        try:
            found += observed(vlm, batch, tokens)
        except UserError:
            found += [None] if len(batch) == 1 else [_observed(vlm, [each], tokens)[0] for each in batch]
    return found


def table(found: dict) -> list[str]:
    """For people."""
    latents = found["latents"]
    lines = [f"latents of {latents['count']} questions{_geometry_words(latents)}"]
    if latents["never_opened"] or latents["never_closed"]:
        lines.append(
            f"{100 * latents['never_opened']:.1f} % of their replies open no span, "
            f"{100 * latents['never_closed']:.1f} % leave one open"
        )
    lines += [
        f"in the latents' place   correct   less own (95 % interval)        p (own: {found['own']:.2f} %)",
    ]
    for name, result in found["interventions"].items():
        p = result["mcnemar"] if result["sign_flip"] is None else result["sign_flip"]
        interval = f"{result['difference']:+.2f} ({result['low']:+.2f} to {result['high']:+.2f})"
        lines.append(f"  {name:<20} {result['b']:8.2f}   {interval:<30}  {p:.3g}")
    return lines


def _geometry_words(latents: Mapping[str, float]) -> str:
    if "norm" not in latents:  # fewer than two
        return ""
    ratio = (
        f" over the true ones' {latents['norm_ratio']:.3f}" if "norm_ratio" in latents else f" {latents['norm']:.3g}"
    )
    return (
        f": cosine between questions {latents['pairwise_cosine']:.3f} "
        f"(centred {latents['pairwise_cosine_centred']:.3f}), norm{ratio}"
    )
