"""The training step: packed by us against padded by stock transformers and torch's AdamW, on the same examples.

Both start from the same weights, train every weight with the same loss, clipping and optimiser, and take the same
batches in turn; the first losses are compared and printed.
"""

import argparse
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import PIL.Image
from jax.sharding import Mesh

from latent_jax.config import schema
from latent_jax.config.training import Config, mixture
from latent_jax.data import batch_shapes, packing, sources
from latent_jax.data.chat import Processor
from latent_jax.data.images import open_image
from latent_jax.data.layout import Example, Room
from latent_jax.data.prompts import DESCRIBE
from latent_jax.errors import UserError
from latent_jax.methods import sft
from latent_jax.models import hf_io
from latent_jax.models.qwen2_5_vl import flops
from latent_jax.models.qwen2_5_vl.config import ModelConfig
from latent_jax.perf import models, theirs, timing
from latent_jax.perf.timing import Report
from latent_jax.runtime import sharding
from latent_jax.training.state import first_state, make_setup
from latent_jax.training.step import make_step

BATCHES = 4  # different ones, taken in turn in every run
# What an example is: an image with its full description, or with one question, or with up to nine. Nine questions are
# views of one image to us; stock transformers gets nine conversations, each with the image.
EXAMPLES = ("captions", "questions", "mixed", "views")
LEARNING_RATE, DECAY, CLIP = 1e-4, 0.01, 1.0


@dataclasses.dataclass(frozen=True)
class Batch:
    """The same examples for both: packed, and as conversations (the last message is the assistant's)."""

    packed: packing.Batch
    conversations: list[list[dict]]
    examples: int


def measure(options: argparse.Namespace) -> Report:
    config = _config(options)
    mesh = sharding.make_mesh(-1, 1, 1, models.devices())
    with models.checkpoint(options.model, options.width, options.layers) as directory:
        processor = Processor.from_directory(directory)
        model_config = models.config_of(directory, processor)
        batches, batch_shape = make_batches(config, processor, model_config, mesh.size, options)
        config = dataclasses.replace(
            config, data=dataclasses.replace(config.data, image_patches=batch_shape.image_patches)
        )
        sides = {"ours": _ours(config, directory, model_config, mesh, batches)}
        losses: dict[str, list[float]] = {}
        if options.against == "torch":
            sides |= _theirs(directory, processor, batches)

        def kept(name: str) -> None:
            losses.setdefault(name, []).extend(sides[name]())

        times = timing.alternate({name: partial(kept, name) for name in sides}, options.repeats)
        with timing.profiled(options.profile):
            sides["ours"]()
    examples = sum(batch.examples for batch in batches)
    lines, numbers = timing.compared("examples", examples, times)
    work = sum((flops.count(batch.packed) for batch in batches[1:]), flops.count(batches[0].packed))
    text, vision = flops.Ledger(model_config, "cpu", mesh.size, vision="weights").flops(work)
    rate = (text + vision) / times["ours"].median / 1e9
    rows = [len(batch.conversations) for batch in batches]
    fill = batch_shapes.fill([packing.size_of(e) for e in _laid_out(config, processor, 512)], batch_shape)
    lines.append(
        f"ours: {batch_shape.groups} x {batch_shape.rows} rows of {batch_shape.tokens} tokens and "
        f"{batch_shape.patches} patches, "
        f"{rate:.1f} GFLOP/s of what the step must compute (docs: models/qwen2_5_vl/flops.py)"
    )
    numbers |= {"losses": {name: each[: len(batches)] for name, each in losses.items()}, "padded_rows": rows}
    numbers |= {
        "budgets": dataclasses.asdict(batch_shape),
        "fill": fill,
        "needed_flops": {"text": text, "vision": vision},
    }
    if len(losses) > 1:
        pairs = [(losses["ours"][0], each[0]) for name, each in losses.items() if name != "ours"]
        apart = max(abs(a - b) / b for a, b in pairs)
        numbers["first_loss_difference"] = apart
        lines.append(f"first loss: {pairs[0][0]:.6f} ours, {pairs[0][1]:.6f} theirs (relative difference {apart:.1e})")
        if apart > 1e-3:
            raise UserError(f"step: the losses differ by {apart:.1e}; what is timed is not the same step")
    title = (
        f"step: {examples} examples ({options.examples}) in {len(batches)} batches, width "
        f"{model_config.text.hidden_size}, {model_config.text.num_hidden_layers} layers, float32"
    )
    return Report(title, lines, numbers)


# ---------------------------------------------------------------- the same examples


def _config(options: argparse.Namespace) -> sft.SftConfig:
    made = schema.default("sft")
    made.model.update(trainable="all", unroll=4, remat="none", compute_dtype="float32")
    made.data.row_tokens = 128
    made.chat.update(captions="first", prompt="plain", questions=9 if options.examples == "views" else 1)
    made.data.name = {"captions": "scenes", "mixed": "scenes_questions:0.5,scenes:0.5"}.get(
        options.examples, "scenes_questions"
    )
    made.train.update(batch_size=options.batch, learning_rate=LEARNING_RATE, weight_decay=DECAY, clip=CLIP)
    made.train.update(warmup=0.0, schedule="constant", beta2=0.999)
    config = schema.resolve(made)
    if not isinstance(config, sft.SftConfig):
        raise TypeError(f"method sft: got the config {type(config).__name__}, expected SftConfig")
    return config


def _records(config: Config) -> Iterator[tuple[dict, int]]:
    """Records of the sources in turn."""
    opened = [sources.open_source(name, "", "train") for name, _ in mixture(config.data.name)]
    return ((source[i % len(source)], i) for i in itertools.count() for source in opened)


def _laid_out(config: sft.SftConfig, processor: Processor, count: int) -> list[Example]:
    return [
        processor.lay_out(sft.layout(record, index, config, processor))
        for record, index in itertools.islice(_records(config), count)
    ]


def make_batches(
    config: sft.SftConfig, processor: Processor, model_config: ModelConfig, shards: int, options: argparse.Namespace
) -> tuple[list[Batch], packing.BatchShape]:
    """The first steps' examples, packed as training packs them, and as the conversations that they are."""
    vision = model_config.vision
    batch_shape = batch_shapes.choose(
        _laid_out(config, processor, 256),
        batch_size=config.train.batch_size,
        groups=shards,
        window_patches=vision.window_patches,
        merge_unit=vision.merge_unit,
        row_tokens=config.data.row_tokens,
        room=Room(),
    )
    count = (BATCHES + 1) * config.train.batch_size
    records = list(itertools.islice(_records(config), count))
    steps = packing.batches(_laid_out(config, processor, count), batch_shape)
    made = []
    for packed in itertools.islice(steps, BATCHES):
        taken = [records[number] for number in sorted(packed["number"][packed["example_mask"]].tolist())]
        talks = [talk for record, index in taken for talk in conversations(record, index, config)]
        made.append(Batch(packed, talks, len(taken)))
    return made, batch_shape


def conversations(record: dict, index: int, config: Any) -> list[list[dict]]:
    """What methods.sft shows of a record, as whole conversations: one a question, or its description."""
    image = open_image(record["images"][0])
    if record["questions"]:
        rng = np.random.default_rng((config.seed, index))
        order = rng.permutation(len(record["questions"]))[: config.chat.questions]
        pairs = [(record["questions"][i]["question"], record["questions"][i]["answer"]) for i in order]
    else:
        pairs = [(DESCRIBE, record["captions"][0])]
    return [_conversation(image, question, answer) for question, answer in pairs]


def _conversation(image: PIL.Image.Image, question: str, answer: str) -> list[dict]:
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]


# ---------------------------------------------------------------- the two steps


def _ours(
    config: Config, directory: Path, model_config: ModelConfig, mesh: Mesh, batches: list[Batch]
) -> Callable[[], list[float]]:
    setup = make_setup(config, sft.METHOD, model_config, mesh, {})
    state = first_state(setup, hf_io.resolve(directory))
    step, place = make_step(setup), sharding.batch_sharding(mesh)

    def run() -> list[float]:
        nonlocal state
        losses = []
        for batch in batches:
            state, found = step(state, jax.device_put(batch.packed, place))
            losses.append(found["loss/total"])
        return [float(loss) for loss in losses]

    return run


def _theirs(directory: Path, processor: Processor, batches: list[Batch]) -> dict[str, Callable[[], list[float]]]:
    """With one thread and with one a core; each trains its own copy of the model."""
    import torch

    template = processor.tokenizer.chat_template
    made = []
    for batch in batches:
        inputs = theirs.inputs(directory, template, batch.conversations, side="right", prompt=False)
        inputs["labels"] = _labels(directory, processor, batch, inputs)
        made.append(inputs)

    def side(threads: int) -> Callable[[], list[float]]:
        model = theirs.load_model(directory).train()
        matrices = [p for p in model.parameters() if p.dim() > 1]
        rest = [p for p in model.parameters() if p.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": DECAY}, {"params": rest, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.999), eps=1e-8)

        def run() -> list[float]:
            torch.set_num_threads(threads)
            losses = []
            for inputs in made:
                optimizer.zero_grad()
                loss = model(**inputs).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
                losses.append(loss.detach())
            return [float(loss) for loss in losses]

        return run

    counts = sorted({1, timing.cores()})
    return {f"torch, {count} thread" + "s" * (count > 1): side(count) for count in counts}


def _labels(directory: Path, processor: Processor, batch: Batch, inputs: dict) -> Any:
    """Token ids where the assistant speaks, its end of turn included; -100 elsewhere."""
    prompts = [conversation[:-1] for conversation in batch.conversations]
    asked = theirs.inputs(directory, processor.tokenizer.chat_template, prompts, side="right", prompt=True)[
        "attention_mask"
    ].sum(1)
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    labels = inputs["input_ids"].clone()
    for row, start in zip(labels, asked.tolist(), strict=True):
        last = start + int((row[start:] == end).nonzero()[0]) + 1
        row[:start], row[last:] = -100, -100
    return labels
