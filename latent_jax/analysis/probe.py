"""Does the model imagine? Held-out geometry of predicted latents, and the zero-shot imagined probe with its controls.

The probe asks visual questions of an image that is not there: the latents predicted from its full description stand
where the image's tokens would. Nothing was trained on such input. Its controls are the same questions over the true
latents, over the mean latent, over the latents of a head that was never trained, and over the description as text.
"""

import dataclasses
import functools
import json
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from latent_jax.analysis import pictures
from latent_jax.analysis.geometry import latent_geometry
from latent_jax.config.training import Config, mixture
from latent_jax.data import batch_shapes, packing, pipeline, sources
from latent_jax.data.chat import Processor
from latent_jax.data.layout import Example, Layout
from latent_jax.data.prompt_batch import one_per_row
from latent_jax.errors import UserError
from latent_jax.inference import decode
from latent_jax.methods import pretrain
from latent_jax.methods.latents import Latent, as_inputs, imagined_grid
from latent_jax.models.heads import LatentVLM
from latent_jax.models.qwen2_5_vl.model import Qwen2_5_VL
from latent_jax.runtime import files
from latent_jax.runtime.progress import Progress

FILES = ("imagination.json", pictures.CURVES, pictures.NEIGHBOURS)  # what `run` writes into the workdir
ARMS = ("imagined", "true latents", "mean latents", "untrained head", "caption as text")
# Records that one compiled call takes: of the probe, and of the held-out latents.
CHUNK, BATCH = 32, 64


def caption_layout(record: dict, config: Any) -> Layout:
    """Full description (captions[0]) -> slots, with the image as target."""
    return pretrain.imagine_layout(record["captions"][0], config.latent, tuple(record["images"][:1]), record["key"])


def run(
    model: LatentVLM, config: Any, processor: Processor, directory: Path, say: Callable[[str], None]
) -> dict[str, float | str]:
    """Reports on the held-out split: says a table, what its words mean and what to try next, and writes
    `imagination.json` and two pictures into the workdir.

    Where the data has no such split, reports nothing: `lacking` reported it before the first step. Raises UserError
    where it is damaged.
    """
    try:
        if lacking(config):
            return {}
        records, examples = usable(held_out(config), config, processor)
    except sources.Damaged as problem:
        raise UserError(
            f"no report on held-out data: {problem}. All steps are done: once the data is mended, the same command "
            "makes the report"
        ) from None
    except UserError as problem:
        say(f"no report on held-out data: {problem}")
        return {}
    vision = model.vlm.config.vision
    batch_shape = batch_shapes.choose(
        examples,
        batch_size=min(BATCH, len(examples)),
        window_patches=vision.window_patches,
        merge_unit=vision.merge_unit,
        row_tokens=config.data.row_tokens,
        room=pretrain.room(config),
    )
    # The block of full attention is as long as the longest image of these records, not of the training data.
    data = dataclasses.replace(config.data, image_patches=batch_shape.image_patches)
    batches = list(packing.batches(examples, batch_shape))
    config = dataclasses.replace(config, data=data)
    finished = 0
    seen: list[np.ndarray] = []
    with Progress(_work(records), 0, config.log.progress, unit="example", title="report") as shown:

        def tick(count: int) -> None:
            nonlocal finished
            finished += count
            shown.update(finished, {})

        found = report(model, batches, records, config, processor, tick, lambda *both: seen.extend(both))
    name = mixture(config.data.name)[0][0]
    split = f"records of {config.data.split}" if config.data.holdout else config.evaluate.split
    whole: dict[str, float | str] = {"examples": len(records), "split": split, "data": name, **found}
    files.write_text(directory / FILES[0], json.dumps(whole, indent=2) + "\n")
    made, failed = pictures.draw(directory, records, seen[0], seen[1], f"{split} of {name}")
    lines = [*table(whole), *legend(whole), *failed]
    if made:
        lines += [f"pictures: {', '.join(str(directory / name) for name in made)}"]
    for line in [*lines, *advice(records[0], config, directory, found.get("probe/imagined"))]:
        say(line)
    return whole


def usable(records: Sequence[dict], config: Any, processor: Processor) -> tuple[list[dict], list[Example]]:
    """The records that can be laid out, and their examples. Raises UserError where none can."""
    kept, examples, problem = [], [], None
    for record in records:
        try:
            with pipeline.naming(record):
                example = processor.lay_out(caption_layout(record, config))
                if config.data.tokens and len(example.tokens) > config.data.tokens:
                    raise UserError(f"record {record['key']!r}: longer than config.data.tokens={config.data.tokens}")
        except UserError as error:
            problem = problem or error
            continue
        examples.append(example)
        kept.append(record)
    if not kept:
        raise problem or UserError("the split is empty")
    return kept, examples


def held_out(config: Config) -> list[dict]:
    """The first `evaluate.examples` held-out records; those of scenes with questions about the same images."""
    name = mixture(config.data.name)[0][0]
    source = sources.held_out(name, config.data, config.evaluate.split, config.seed)
    if name == "scenes" and not config.data.holdout:
        questions = sources.open_source("scenes_questions", config.data.path, config.evaluate.split)
        source = sources.join(source, questions)
    return sources.first(source, config.evaluate.examples)


def lacking(config: Config) -> str:
    """What a report on held-out data would miss, looked up before training; "" where all is there."""
    if config.data.holdout:
        return ""
    path, split = config.data.path, config.evaluate.split
    hint = "config.data.holdout=N keeps N records of the training split for it"
    if split == config.data.split:
        return f"config.evaluate.split: {split!r} is what the run trains on; {hint}"
    for name in _held_out_names(config):
        try:
            splits = sources.split_names(name, path)
        except UserError as problem:
            return f"{problem}; {hint}"
        if split not in splits:
            return f"{name} in {path or 'the cache'} has no split {split!r}, it has {', '.join(splits)}; {hint}"
        sources.open_source(name, path, split)  # what is damaged ends the run now, not after its last step
    return ""


def _held_out_names(config: Config) -> list[str]:
    name = mixture(config.data.name)[0][0]
    return [name, "scenes_questions"] if name == "scenes" else [name]


def table(found: Mapping[str, float | str]) -> list[str]:
    """The report for a person to read."""
    get = found.__getitem__
    far, near = _classes(found)
    lines = [
        f"held-out {get('split')}: {get('examples')} captions, latents predicted from words alone",
        f"  cosine to the true latent: {far} {get('cosine/informative'):.3f}, "
        f"{near} {get('cosine/empty'):.3f}; to another image's {get('cosine/shuffled'):.3f}",
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


def _classes(found: Mapping[str, float | str]) -> tuple[str, str]:
    """What the two classes of `geometry.informative` are: only of scenes is it known that one of them is empty."""
    scenes = str(found.get("data", "scenes")).startswith("scenes")
    return ("informative cells", "empty cells") if scenes else ("cells far from the mean latent", "cells near it")


def legend(found: Mapping[str, float | str]) -> list[str]:
    """What the words of `table` mean, for someone who sees them for the first time."""
    far, _ = _classes(found)
    lines = [
        "what this says:",
        "  cosine             1 = the predicted latent has the true one's direction, 0 = unrelated; should be well",
        "                     above that to another image's, which what suits every image alike would get",
    ]
    if far.startswith("informative"):
        lines += [
            "  informative cells  true latents far from the mean latent: there are objects; empty cells: near it",
        ]
    else:
        lines += [
            "  far, near          cells of the image's grid by how far their true latents are from the mean; the",
            "                     border is found from these distances (Otsu's threshold)",
        ]
    lines += [
        "  effective rank     in how many directions latents differ; 1 = all alike; far below the true one = collapsed",
        "  norm ratio         length of predicted over true latents; below 1 = hedged between several possible images",
        "  recall@k           how often a caption's own image is among the k nearest to what was imagined from it",
    ]
    if "probe/questions" in found:
        lines += [
            "  imagined           questions about an image that is not there: latents predicted from its description",
            "                     stand in for it. Most to expect: what true latents give. Mean latents (equal for all",
            "                     images) and an untrained head (random weights) give what guessing gives",
            "  caption as text    the description in words instead. The embedded model has only been asked about",
            "                     images, never about words: a few percent there are no fault of this run",
        ]
    return lines


def advice(record: dict, config: Config, directory: Path, answered: float | None = None) -> list[str]:
    """What to try next: commands as they can be typed. `answered`: percent of such questions, where it is known."""
    caption = _plain(record["captions"][0])[:200]
    asked = record["questions"][0] if record["questions"] else {"question": "Describe the image."}
    words = (f"--model={directory}", f"--imagine={caption}", f"--prompt={_plain(asked['question'])}")
    right = f"  # right: {_plain(asked['answer'])}" if "answer" in asked else ""
    if right and answered is not None:
        right += f"; of such questions it answers {answered:.0f} %"
    lines = ["try next:", f"  python -m latent_jax.generate {' '.join(map(shlex.quote, words))}{right}"]
    if config.checkpoint.export and record["questions"]:
        path = shlex.quote(f"--config.model.path={directory / 'hf'}")
        lines += [f"  python -m latent_jax.main --config=configs/finetune.py --workdir=runs/finetune {path}"]
    return lines


def _plain(text: str) -> str:
    """In one line, without what a terminal would take as a command."""
    return "".join(letter for letter in " ".join(text.split()) if letter.isprintable())


def _work(records: Sequence[dict]) -> int:
    """How many examples `report` passes through the model: the captions, and those with questions for the probe."""
    asked = sum(bool(record["questions"]) for record in records)
    return len(records) * (2 if asked else 1) + len(ARMS) * asked


def report(
    model: LatentVLM,
    batches: Sequence[dict],
    records: Sequence[dict],
    config: Any,
    processor: Processor,
    tick: Callable[[int], None] = lambda _: None,
    see: Callable[[np.ndarray, np.ndarray], None] = lambda *_: None,
) -> dict[str, float]:
    """Everything that is known about a model's imagination on held-out records, as {name: value}.

    Args:
      batches: the packed `caption_layout` of every record, in order.
      records: hold captions[0], the full description; those that hold questions too are probed.
      tick: called with how many more examples have passed through the model (of `_work`).
      see: gets the captions' (predicted, target) latents (E, S, Z).

    The keys are those of `geometry.latent_geometry`; `probe/ARM`, accuracies in percent; `probe/questions`, how many.
    """
    predicted, target = latents(model, batches, config, tick)
    see(predicted, target)
    found = latent_geometry(predicted, target)
    asked = [at for at, record in enumerate(records) if record["questions"]]
    if not asked:
        return found
    guessed, _ = latents(untrained(model, config), batches, config, tick)
    given = {
        "imagined": predicted[asked],
        "true latents": target[asked],
        "mean latents": np.zeros_like(target[asked]),  # the centre of standardised latents
        "untrained head": guessed[asked],
    }
    over_latents, over_text = probe_layouts([records[at] for at in asked], config.latent, processor)
    examples = [processor.lay_out(layout) for layout in over_latents]

    def correct(z: Float[np.ndarray, "E S Z"]) -> np.ndarray:
        inputs = as_inputs(model.vlm, model.head.unstandardise(jnp.asarray(z)), config.latent)
        return answers(model, examples, inputs, tick)

    hits = {arm: correct(z) for arm, z in given.items()}
    hits["caption as text"] = answers(model, [processor.lay_out(layout) for layout in over_text], None, tick)
    found |= {f"probe/{arm}": 100 * float(right.mean()) for arm, right in hits.items()}
    return found | {"probe/questions": float(len(hits["imagined"]))}


def latents(
    model: LatentVLM, batches: Iterable[dict], config: Any, tick: Callable[[int], None] = lambda _: None
) -> tuple[np.ndarray, np.ndarray]:
    """(predicted, target) standardised latents (E, S, Z) of packed caption examples, in data order."""
    run = jax.jit(lambda model, batch: pretrain.forward(model, batch, config)[1:])
    rows = []
    for batch in batches:
        for micro in range(len(batch["tokens"])):
            one = {key: value[micro] for key, value in batch.items()}
            rows.append([np.asarray(x)[one["target_mask"][..., 0]] for x in run(model, one)])
            tick(len(rows[-1][0]))
    predicted, target = zip(*rows, strict=True)
    return np.concatenate(predicted), np.concatenate(target)


def untrained(model: LatentVLM, config: Any) -> LatentVLM:
    """The same language model with a head that was never trained, and the trained head's statistics."""
    head = pretrain.build_head(model.vlm.config, config, nnx.Rngs(config.seed + 1))
    head.mean[...], head.scale[...] = model.head.mean[...], model.head.scale[...]
    return LatentVLM(model.vlm, head)


def probe_layouts(records: Sequence[dict], latent: Latent, processor: Processor) -> tuple[list[Layout], list[Layout]]:
    """The questions about each record over imagined latents, and over its full description as text."""
    grid = imagined_grid(latent)
    over_latents, over_text = [], []
    for record in records:
        pairs = [(question["question"], question["answer"]) for question in record["questions"]]
        over_latents.append(processor.render_views([{"type": "imagine", "grid": grid}], pairs, key=record["key"]))
        described = [(f"{record['captions'][0]} {question}", answer) for question, answer in pairs]
        over_text.append(processor.render_views([], described, key=record["key"]))
    return over_latents, over_text


def answers(
    model: LatentVLM,
    examples: Sequence[Example],
    given: jax.Array | None,
    tick: Callable[[int], None] = lambda _: None,
) -> np.ndarray:
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
        rows = one_per_row(chunk, model.vlm.config)
        likeliest = np.asarray(_likeliest(model.vlm, rows.batch, own, image_patches=rows.image_patches))[0]
        for row, example in zip(likeliest[:count], chunk, strict=False):
            wrong = (row[: len(example.tokens)] != example.targets) & (example.loss_weights > 0)
            asked = np.unique(example.view_ids[example.loss_weights > 0])
            correct += [not wrong[example.view_ids == view].any() for view in asked]
        tick(count)
    return np.array(correct, bool)


@functools.partial(jax.jit, static_argnames="image_patches")
def _likeliest(
    vlm: Qwen2_5_VL, batch: dict[str, Array], given: Float[Array, "X D"], *, image_patches: int
) -> Int[Array, "1 B T"]:
    """The likeliest next token at every position."""
    hidden, _ = vlm.decode(decode.embed(vlm, batch, given, image_patches), batch)
    return jnp.argmax(vlm.logits(hidden), axis=-1)
