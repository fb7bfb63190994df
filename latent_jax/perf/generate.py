"""Generation: a batch of mixed prompts, ours against `generate` of transformers, greedy, the same tokens."""

import argparse
import random
from collections.abc import Callable
from pathlib import Path

import PIL.Image

from latent_jax.data.scenes import render, world
from latent_jax.inference import batches, vlm
from latent_jax.perf import models, theirs, timing
from latent_jax.perf.timing import Report

QUESTIONS = (
    "Describe the image.",
    "What color is the ball?",
    "How many cubes are there? Answer with one number.",
    "What is left of the red ball?",
)


def conversations(count: int) -> list[list[dict]]:
    """One image and a long answer, one image and a short one, two images, words alone, and so on."""
    made = []
    for i in range(count):
        images = [_picture(100 * i + j) for j in range((1, 1, 2, 0)[i % 4])]
        content = [{"type": "image", "image": image} for image in images]
        made.append([{"role": "user", "content": [*content, {"type": "text", "text": QUESTIONS[i % 4]}]}])
    return made


def measure(options: argparse.Namespace) -> Report:
    """Both from laid-out prompts to token ids; ours also from messages to text."""
    devices = models.devices()
    with models.checkpoint(options.model, options.width, options.layers) as directory:
        loaded = vlm.load(directory, "float32", devices if len(devices) > 1 else None)
        batch = conversations(options.batch)
        examples, given = loaded.prompts(batch)
        copies, new = loaded.copies or (loaded.model,), options.max_new_tokens
        answers: dict[str, list[list[int]]] = {}

        def ours() -> None:
            answers["ours"] = [
                answer.ids for answer in batches.answers(copies, examples, given, loaded.eos, max_new_tokens=new)
            ]

        sides: dict[str, Callable[[], object]] = {"ours": ours}
        if options.against == "torch":
            sides |= _their_sides(directory, loaded, batch, new, answers)
        times = timing.alternate(sides, options.repeats)
        whole = timing.alternate({"ours, text to text": lambda: loaded.generate(batch, new)}, options.repeats)
        with timing.profiled(options.profile):
            ours()
    tokens = sum(map(len, answers["ours"]))
    lines, numbers = timing.compared("tokens", tokens, times)
    more, rest = timing.compared("tokens", tokens, whole, "ours, text to text")
    equal = [sum(a == b for a, b in zip(answers["ours"], found, strict=True)) for found in answers.values()]
    if len(equal) > 1:
        lines.append(f"rows with the same tokens: {min(equal)} of {len(batch)}")
    numbers |= rest | {"rows": len(batch), "rows_equal": min(equal), "new_tokens": tokens, "limit": new}
    lengths = [len(example.tokens) for example in examples]
    numbers["prompt_tokens"] = lengths
    span = f"{min(lengths)} to {max(lengths)} tokens"
    title = f"generate: {len(batch)} prompts of {span}, at most {new} new ones, float32"
    return Report(title, lines + more, numbers)


def _their_sides(
    directory: Path, loaded: vlm.VLM, batch: list[list[dict]], new: int, answers: dict[str, list[list[int]]]
) -> dict[str, Callable[[], object]]:
    """Torch with one thread and with one a core: the better one counts."""
    import torch

    model = theirs.load_model(directory).eval()
    inputs = theirs.inputs(directory, loaded.processor.tokenizer.chat_template, batch, side="left", prompt=True)
    start = inputs["input_ids"].shape[1]

    def side(threads: int) -> Callable[[], None]:
        def run() -> None:
            torch.set_num_threads(threads)
            out = model.generate(
                **inputs,
                do_sample=False,
                repetition_penalty=1.0,
                max_new_tokens=new,
                eos_token_id=list(loaded.eos),
                pad_token_id=0,
            )
            rows = out[:, start:].tolist()
            ends = [next((i + 1 for i, token in enumerate(row) if token in loaded.eos), len(row)) for row in rows]
            answers["torch"] = [row[:end] for row, end in zip(rows, ends, strict=True)]

        return run

    counts = sorted({1, timing.cores()})
    return {f"torch, {count} thread" + "s" * (count > 1): side(count) for count in counts}


def _picture(seed: int) -> PIL.Image.Image:
    scene = world.sample(random.Random(seed), "train", placement="grid", objects=(2, 4), striped=0.5)
    return render.render(scene)
