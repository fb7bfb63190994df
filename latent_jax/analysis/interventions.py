"""Do the latents matter? An evaluation again with something else in their place, compared question by question.

Where noise, a constant or another question's latents do as well as the model's own, the answers do not come from them.
What is put there are arrays of input embeddings, built here, whatever method made the latents.
"""

import dataclasses
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from latent_jax.analysis.geometry import pairwise_cosine
from latent_jax.benchmarks.items import Item
from latent_jax.config.evaluation import LATENTS, Evaluation
from latent_jax.errors import UserError
from latent_jax.evaluation.paired import compare
from latent_jax.inference.prompts import Thought
from latent_jax.runtime import files

SAMPLE = 256  # questions whose latents are looked at, spread over all
BATCH = 32
_TRIED = 8  # questions after a donor that cannot be shown, before its taker is skipped


@runtime_checkable
class Thinker(Protocol):
    """What an intervention needs of inference.vlm.VLM."""

    @property
    def model(self) -> Any: ...

    def think(self, conversations: Sequence[Sequence[dict]]) -> list[list[Thought]]: ...

    def generate(self, conversations: Any, max_new_tokens: int, *, thoughts: Any = None) -> list[str]: ...


def run(config: Evaluation, directory: Path, latents: Mapping[str, float], evaluate: Callable) -> dict:
    """Evaluates with every intervention in `directory`/latents_NAME, and writes `directory`/interventions.json.

    latents: `geometry` of the model's own. evaluate: (config, directory) -> the results of one evaluation.
    Returns {"latents", "own": percent, "interventions": {name: compare's numbers, own as a}}. All of it resumes.
    """
    found: dict = {"latents": dict(latents), "interventions": {}}
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


class Moments(NamedTuple):
    """Of the thoughts of a sample of questions, as inputs: the mean of every slot, the deviation of every channel of a
    slot around it."""

    mean: Float[np.ndarray, "M D"]
    deviation: Float[np.ndarray, "M D"]


def moments(vlm: Thinker, conversations: Sequence[list[dict]]) -> Moments:
    """Measured on what the model thinks in these conversations, one imagine part each."""
    inputs = np.stack([own.inputs for own in _sample(vlm, conversations)]).astype(np.float64)
    return Moments(inputs.mean(0).astype(np.float32), inputs.std(0).astype(np.float32))


def sender(
    config: Evaluation,
    vlm: Thinker,
    items: Sequence[Item],
    show: Callable[[Sequence[Item]], list[list[dict]]],
    tokens: int,
) -> Callable[[Sequence[Item]], list[str]]:
    """Items -> the replies to them with `config.evaluate.latents` in the place of their latents.

    items: all questions of the split, of which donors are taken. show: items -> conversations that ask for latents.
    A question's replacement depends on the split, the seed and the question itself, never on its batch. A donor that
    cannot be shown gives way to the next question that can.
    """
    name, seed = config.evaluate.latents, config.seed
    partners = donors(config, items) if name in ("shuffled", "donor") else {}
    known = moments(vlm, show(spread(items))) if name in ("mean", "noise") else None
    places = {item.id: place for place, item in enumerate(items)}

    def donated(batch: Sequence[Item]) -> list[Thought]:
        first = [partners[item.id] for item in batch]
        found = _thoughts(vlm, show(first))
        for number, (thought, donor) in enumerate(zip(found, first, strict=True)):
            after = (items[(places[donor.id] + more) % len(items)] for more in range(1, _TRIED + 1))
            found[number] = thought or next(filter(None, (_thoughts(vlm, show([other]))[0] for other in after)), None)
        if None in found:
            raise UserError(f"question {batch[found.index(None)].id!r:.100}: no donor of latents can be shown")
        return found

    def send(batch: Sequence[Item]) -> list[str]:
        shown = show(batch)
        if name == "none":
            given = [() for _ in batch]
        elif partners:
            given = [[thought.inputs] for thought in donated(batch)]
        else:
            own = vlm.think(shown)
            given = [[replaced(name, one.inputs, known, seed) for one in thoughts] for thoughts in own]
        return vlm.generate(shown, tokens, thoughts=given)

    return send


def replaced(name: str, own: Float[np.ndarray, "M D"], known: Moments | None, seed: int) -> Float[np.ndarray, "M D"]:
    """What stands in the place of a question's own thought.

    zero: zeros. mean: the mean over questions. noise: draws with the mean and deviation over questions. permuted: its
    own, slots in another order. Draws are of the seed and the thought itself.
    """
    if name == "zero":
        return np.zeros_like(own)
    if name == "mean":
        return known.mean.astype(own.dtype)
    rng = np.random.default_rng([seed, zlib.crc32(np.ascontiguousarray(own).view(np.uint8))])
    if name == "noise":
        return (known.mean + known.deviation * rng.standard_normal(own.shape, np.float32)).astype(own.dtype)
    if name == "permuted":
        order = rng.permutation(len(own))
        return own[order if len(own) == 1 or (order != np.arange(len(own))).any() else np.roll(order, 1)]
    raise ValueError(name)


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


def geometry(vlm: Thinker, conversations: Sequence[list[dict]]) -> dict[str, float]:
    """Of the latents that are predicted in conversations: how alike those of different ones are (cosine of all slots
    together; as they are, and less their mean), their norm (over that of the dataset's true ones too, where the head
    knows it), and the shares of latent spans that are never opened or closed (the prompt does both, so none)."""
    latents = np.stack([own.latents for own in _sample(vlm, conversations)]).astype(np.float64)
    norm, head = np.sqrt((latents**2).sum(-1).mean()), vlm.model.head
    flat = lambda x: x.reshape(len(x), -1)  # noqa: E731
    found = {
        "count": len(latents),
        "pairwise_cosine": pairwise_cosine(flat(latents)),
        "pairwise_cosine_centred": pairwise_cosine(flat(latents - latents.mean(0))),
        "norm": float(norm),
        "never_opened": 0.0,
        "never_closed": 0.0,
    }
    if hasattr(head, "mean") and hasattr(head, "scale"):
        mean, scale = (np.asarray(array[...], np.float64) for array in (head.mean, head.scale))
        found["norm_ratio"] = float(norm / np.sqrt((mean**2 + scale**2).sum()))
    return found


def _sample(vlm: Thinker, conversations: Sequence[list[dict]]) -> list[Thought]:
    """What the model thinks in those that can be shown. Raises UserError where none can."""
    found = [thought for thought in _thoughts(vlm, conversations) if thought is not None]
    if not found:
        raise UserError(f"none of {len(conversations)} questions can be shown, so nothing is known of their latents")
    return found


def _thoughts(vlm: Thinker, conversations: Sequence[list[dict]]) -> list[Thought | None]:
    """The one thought of each conversation; None for one that cannot be shown, such as one with a broken image."""
    found = []
    for at in range(0, len(conversations), BATCH):
        batch = conversations[at : at + BATCH]
        try:
            found += [thought for (thought,) in vlm.think(batch)]
        except UserError:
            found += [None] if len(batch) == 1 else [_thoughts(vlm, [each])[0] for each in batch]
    return found


def table(found: dict) -> list[str]:
    """For people."""
    latents = found["latents"]
    ratio = (
        f" over the true ones' {latents['norm_ratio']:.3f}" if "norm_ratio" in latents else f" {latents['norm']:.3g}"
    )
    lines = [
        f"latents of {latents['count']} questions: cosine between questions {latents['pairwise_cosine']:.3f} "
        f"(centred {latents['pairwise_cosine_centred']:.3f}), norm{ratio}",
        f"in the latents' place   correct   less own (95 % interval)        p (own: {found['own']:.2f} %)",
    ]
    for name, result in found["interventions"].items():
        p = result["mcnemar"] if result["sign_flip"] is None else result["sign_flip"]
        interval = f"{result['difference']:+.2f} ({result['low']:+.2f} to {result['high']:+.2f})"
        lines.append(f"  {name:<20} {result['b']:8.2f}   {interval:<30}  {p:.3g}")
    return lines
