"""Does the model imagine? Held-out geometry of predicted latents, and the zero-shot imagined probe with its controls.

The probe asks visual questions of an image that is not there: the latents predicted from its full description stand
where the image's tokens would. Nothing was trained on such input. Its controls are the same questions over the true
latents, over the mean latent, over the latents of a head that was never trained, and over the description as text.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from latent_jax import generate
from latent_jax.analysis.geometry import latent_geometry
from latent_jax.data import budgeting, pipeline, sources
from latent_jax.data.chat import Codec
from latent_jax.data.layout import Example, Layout
from latent_jax.errors import UserError
from latent_jax.methods import pretrain
from latent_jax.models.heads import LatentVLM
from latent_jax.runtime import files
from latent_jax.settings import mixture

ARMS = ("imagined", "true latents", "mean latents", "untrained head", "caption as text")
# Records that one compiled call takes: of the probe, and of the held-out latents.
CHUNK, BATCH = 32, 64


def caption_layouts(records: Sequence[dict], config) -> list[Layout]:
    """Full description (captions[0]) -> slots, with the image as target, for every record."""
    return [pretrain.imagine_layout(r["captions"][0], config.latent, tuple(r["images"][:1]), r["key"]) for r in records]


def run(model: LatentVLM, config, codec: Codec, directory: Path, say: Callable[[str], None]) -> dict[str, float]:
    """Reports on the held-out split, prints a table and writes `imagination.json` into the workdir.

    Where the data has no such split, says so and reports nothing.
    """
    try:
        records, examples = usable(held_out(config), config, codec)
    except UserError as problem:
        say(f"no report on held-out data: {problem}")
        return {}
    vision = model.vlm.config.vision
    budgets = budgeting.choose(
        examples,
        batch_size=min(BATCH, len(examples)),
        window_patches=vision.window_patches,
        merge_unit=vision.merge_unit,
        row_tokens=config.data.row_tokens,
        slots=pretrain.slots(config),
    )
    # The block of full attention is as long as the longest image of these records, not of the training data.
    data = dataclasses.replace(config.data, image_patches=budgets.image_patches)
    batches = list(pipeline.batches(examples, budgets))
    found = report(model, batches, records, dataclasses.replace(config, data=data), codec)
    found = {"examples": len(records), "split": config.evaluate.split, **found}
    files.write_text(directory / "imagination.json", json.dumps(found, indent=2) + "\n")
    for line in table(found):
        say(line)
    return found


def usable(records: Sequence[dict], config, codec: Codec) -> tuple[list[dict], list[Example]]:
    """The records that can be laid out, and their examples. Raises UserError where none can."""
    kept, examples, problem = [], [], None
    for record, layout in zip(records, caption_layouts(records, config), strict=True):
        try:
            examples.append(codec.lay_out(layout))
        except UserError as error:
            problem = problem or error
            continue
        kept.append(record)
    if not kept:
        raise problem or UserError("the split is empty")
    return kept, examples


def held_out(config) -> list[dict]:
    """The first `evaluate.examples` held-out records; those of scenes with questions about the same images."""
    name = mixture(config.data.name)[0][0]
    source = sources.open_source(name, config.data.path, config.evaluate.split)
    if name == "scenes":
        questions = sources.open_source("scenes_questions", config.data.path, config.evaluate.split)
        source = sources.join(source, questions)
    return [source[index] for index in range(min(config.evaluate.examples or len(source), len(source)))]


def lacking(config) -> str:
    """What a report on held-out data would miss, looked up before training; "" where all is there."""
    try:
        for name in _held_out_names(config):
            sources.open_source(name, config.data.path, config.evaluate.split)
    except UserError as problem:
        return f"{problem}; config.data.holdout=N keeps N records of the training split for it"
    return ""


def _held_out_names(config) -> list[str]:
    name = mixture(config.data.name)[0][0]
    return [name, "scenes_questions"] if name == "scenes" else [name]


def table(found: dict[str, float]) -> list[str]:
    """The report for a person to read."""
    get = found.__getitem__
    lines = [
        f"held-out {get('split')}: {get('examples')} captions, latents predicted from words alone",
        f"  cosine to the true latent: informative cells {get('cosine/informative'):.3f}, "
        f"empty cells {get('cosine/empty'):.3f}; to another image's {get('cosine/shuffled'):.3f}",
        f"  effective rank: predicted {get('effective_rank/predicted'):.1f}, "
        f"true {get('effective_rank/target'):.1f}; norm ratio {get('norm_ratio'):.3f}",
        f"  text -> image retrieval: recall@1 {get('retrieval/recall@1'):.3f} "
        f"(chance {get('retrieval/chance@1'):.3f}), recall@5 {get('retrieval/recall@5'):.3f} "
        f"(chance {get('retrieval/chance@5'):.3f})",
    ]
    if "probe/questions" in found:
        lines += [f"zero-shot imagined probe: {found['probe/questions']:.0f} questions, exact answers in percent"]
        lines += [f"  {arm:<16} {found[f'probe/{arm}']:5.1f}" for arm in ARMS]
    return lines


def report(
    model: LatentVLM, batches: Sequence[dict], records: Sequence[dict], config, codec: Codec
) -> dict[str, float]:
    """Everything that is known about a model's imagination on held-out records, as {name: value}.

    Args:
      batches: the packed `caption_layouts` of the records, in order.
      records: hold captions[0], the full description; those that hold questions too are probed.

    The keys are those of `geometry.latent_geometry`; `probe/ARM`, accuracies in percent; `probe/questions`, how many.
    """
    predicted, target = latents(model, batches, config)
    found = latent_geometry(predicted, target)
    asked = [at for at, record in enumerate(records) if record["questions"]]
    if not asked:
        return found
    guessed, _ = latents(untrained(model, config), batches, config)
    given = {
        "imagined": predicted[asked],
        "true latents": target[asked],
        "mean latents": np.zeros_like(target[asked]),  # the centre of standardised latents
        "untrained head": guessed[asked],
    }
    over_latents, over_text = probe_layouts([records[at] for at in asked], config.latent, codec)
    examples = [codec.lay_out(layout) for layout in over_latents]

    def correct(z):
        inputs = pretrain.as_inputs(model.vlm, model.head.restore(jnp.asarray(z)), config.latent)
        return answers(model, examples, inputs)

    hits = {arm: correct(z) for arm, z in given.items()}
    hits["caption as text"] = answers(model, [codec.lay_out(layout) for layout in over_text], None)
    found |= {f"probe/{arm}": 100 * float(right.mean()) for arm, right in hits.items()}
    return found | {"probe/questions": float(len(hits["imagined"]))}


def latents(model: LatentVLM, batches: Iterable[dict], config) -> tuple[np.ndarray, np.ndarray]:
    """(predicted, target) standardised latents (E, S, Z) of packed caption examples, in data order."""
    run = jax.jit(lambda model, batch: pretrain.forward(model, batch, config)[1:])
    rows = []
    for batch in batches:
        for micro in range(len(batch["tokens"])):
            one = {key: value[micro] for key, value in batch.items()}
            rows.append([np.asarray(x)[one["latent_mask"]] for x in run(model, one)])
    predicted, target = zip(*rows, strict=True)
    return np.concatenate(predicted), np.concatenate(target)


def untrained(model: LatentVLM, config) -> LatentVLM:
    """The same language model with a head that was never trained, and the trained head's statistics."""
    head = pretrain.build_head(model.vlm.config, config, nnx.Rngs(config.seed + 1))
    head.mean[...], head.scale[...] = model.head.mean[...], model.head.scale[...]
    return LatentVLM(model.vlm, head)


def probe_layouts(records: Sequence[dict], latent: pretrain.Latent, codec: Codec) -> tuple[list[Layout], list[Layout]]:
    """The questions about each record over imagined latents, and over its full description as text."""
    grid = pretrain.imagined_grid(latent)
    over_latents, over_text = [], []
    for record in records:
        pairs = [(question["question"], question["answer"]) for question in record["questions"]]
        over_latents.append(codec.render_views([{"type": "imagine", "grid": grid}], pairs, key=record["key"]))
        described = [(f"{record['captions'][0]} {question}", answer) for question, answer in pairs]
        over_text.append(codec.render_views([], described, key=record["key"]))
    return over_latents, over_text


def answers(model: LatentVLM, examples: Sequence[Example], given: jax.Array | None) -> np.ndarray:
    """Whether each question's answer is what greedy decoding would say, questions in order, bool.

    One forward pass: an answer is decoded whole if and only if every one of its tokens, the end of turn included, is
    the likeliest after the true ones before it.
    """
    correct = []
    for at in range(0, len(examples), CHUNK):
        chunk = list(examples[at : at + CHUNK])
        count = len(chunk)
        chunk += [chunk[0]] * (CHUNK - count)  # a full chunk, so that one program serves all
        place = np.minimum(np.arange(at, at + CHUNK), len(examples) - 1)
        own = jnp.zeros((1, model.vlm.config.text.hidden_size)) if given is None else jnp.concatenate(given[place])
        rows = generate.one_per_row(chunk, model.vlm.config)
        likeliest = np.asarray(_likeliest(model.vlm, rows.batch, own, image_patches=rows.image_patches))[0]
        for row, example in zip(likeliest[:count], chunk, strict=False):
            wrong = (row[: len(example.tokens)] != example.targets) & (example.loss_weights > 0)
            asked = np.unique(example.view_ids[example.loss_weights > 0])
            correct += [not wrong[example.view_ids == view].any() for view in asked]
    return np.array(correct, bool)


@functools.partial(jax.jit, static_argnames="image_patches")
def _likeliest(vlm, batch, given, *, image_patches: int):
    """The likeliest next token at every position, (1, R, T)."""
    hidden, _ = vlm.decode(generate.embed(vlm, batch, given, image_patches), batch)
    return jnp.argmax(vlm.logits(hidden), axis=-1)
