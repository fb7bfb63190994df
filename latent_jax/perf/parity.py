"""A checkpoint through stock transformers and through us, layer by layer: is what we load the model that was published?

Both sides start from messages and pixels: theirs is the tokenizer, the image processor and the model of transformers
in torch, on the CPU; ours is our Processor and the Flax model on jax's default device. One model is held at a time,
and of each only the activations of two short prompts.
"""

import dataclasses
import functools
import gc
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
from flax import nnx

from latent_jax.assets import TINY_VL
from latent_jax.data.chat import IMAGE_PAD, Processor
from latent_jax.data.prompt_batch import PromptBatch, one_per_row
from latent_jax.data.scenes import render, world
from latent_jax.errors import UserError
from latent_jax.inference import decode
from latent_jax.models import hf_io
from latent_jax.models.heads import LatentVLM
from latent_jax.models.parameters import Structure
from latent_jax.models.qwen2_5_vl.config import ModelConfig, from_json
from latent_jax.models.qwen2_5_vl.model import Qwen2_5_VL
from latent_jax.perf import timing
from latent_jax.training.workdir import is_workdir

DTYPES = ("float32", "bfloat16")
# fp32: largest difference over the layer's largest entry. bf16: our RMS distance to torch's bf16 is at most RATIO times
# torch's own distance between bf16 and fp32; two independent roundings give sqrt(2).
TOLERANCE, RATIO = 1e-4, 2.0


@dataclasses.dataclass(frozen=True)
class Observed:
    """One side's view of one prompt: fp32 activations by layer name in order, and greedy tokens with the margins by
    which each won over the runner-up (theirs only)."""

    layers: dict[str, np.ndarray]
    tokens: list[int]
    margins: list[float] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Layer:
    """How far ours is from theirs at one layer: largest difference, the same over their largest entry, cosine; and
    for bfloat16 that relative difference between their bfloat16 and float32, and the ratio that RATIO bounds."""

    name: str
    max_abs: float
    relative: float
    cosine: float
    yardstick: float | None
    ratio: float | None

    @property
    def ok(self) -> bool:
        return self.relative <= TOLERANCE if self.ratio is None else self.ratio <= RATIO


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One prompt in one dtype. `parts_at` is the first greedy token that differs, with their margin there."""

    dtype: str
    prompt: str
    layers: tuple[Layer, ...]
    tokens: list[int]
    their_tokens: list[int]
    parts_at: int | None
    margin: float | None

    @property
    def failed_at(self) -> str | None:
        """The first layer out of bounds, or `greedy` where fp32 tokens part although theirs won clearly."""
        bad = next((layer.name for layer in self.layers if not layer.ok), None)
        if bad is None and self.dtype == "float32" and self.margin is not None and self.margin > TOLERANCE:
            return "greedy"
        return bad


def compare(model: str, dtypes: tuple[str, ...] = DTYPES, max_new_tokens: int = 16) -> list[Comparison]:
    """Every dtype and prompt. Raises UserError where torch is missing or `model` is no HF checkpoint."""
    timing.need_torch("--what=parity")
    if model and is_workdir(model):
        raise UserError(f"{model}: a workdir; expected an HF checkpoint (python -m latent_jax.convert writes one)")
    directory = hf_io.resolve(model or TINY_VL)
    processor = Processor.from_directory(directory)
    theirs = {}
    # bfloat16 is judged by how far torch's own lies from its float32.
    for dtype in sorted({*dtypes, "float32"}, reverse=True):
        theirs[dtype] = observe_theirs(directory, processor, dtype, max_new_tokens)
    found = []
    for dtype in dtypes:
        ours = observe_ours(directory, processor, dtype, max_new_tokens)
        found += [_compared(dtype, name, ours[name], theirs[dtype][name], theirs["float32"][name]) for name in ours]
    return found


def prompts() -> dict[str, list[dict]]:
    """Messages: a generated scene, whose windows do not divide it, and words alone."""
    scene = world.sample(random.Random(0), "train", placement="grid", objects=(3, 3), striped=0.5)
    image = render.render(scene).resize((252, 196), PIL.Image.Resampling.BICUBIC)
    content = [{"type": "image", "image": image}, {"type": "text", "text": "Describe the image."}]
    words = [{"type": "text", "text": "What is left of the red ball? Answer in one short sentence."}]
    return {"image": [{"role": "user", "content": content}], "text": [{"role": "user", "content": words}]}


# ---------------------------------------------------------------- theirs


def observe_theirs(directory: Path, processor: Processor, dtype: str, max_new_tokens: int) -> dict[str, Observed]:
    """Both prompts through transformers."""
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(directory, dtype=getattr(torch, dtype))
    model.eval()
    found = {}
    for name, messages in prompts().items():
        inputs = their_inputs(directory, processor.tokenizer.chat_template, messages)
        layers: dict[str, np.ndarray] = {}
        hooks = [module.register_forward_hook(functools.partial(_keep, layers, at)) for at, module in _modules(model)]
        # Patches are sorted into windows between the projection and the first block.
        sorted_patches = functools.partial(_keep_input, layers, "vision.patch")
        hooks.append(model.model.visual.blocks[0].norm1.register_forward_pre_hook(sorted_patches))
        with torch.no_grad():
            model(**inputs)
            for hook in hooks:
                hook.remove()
            out = model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                repetition_penalty=1.0,
                output_logits=True,
                return_dict_in_generate=True,
            )
        logits = torch.stack(out.logits)[:, 0].float()
        best = logits.topk(2).values
        margins = ((best[:, 0] - best[:, 1]) / logits.abs().amax()).tolist()
        tokens = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        found[name] = Observed(layers, tokens, margins)
    del model
    gc.collect()
    return found


def their_inputs(directory: Path, chat_template: str, messages: list[dict]) -> dict[str, Any]:
    """What Qwen2_5_VLProcessor makes of messages with at most one image. (AutoProcessor wants torchvision, whose resize
    is not the one that the published numbers were made with.)"""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    # The PIL processor had the plain name before torchvision's took it.
    kind = getattr(transformers, "Qwen2VLImageProcessorPil", None) or transformers.Qwen2VLImageProcessor
    inputs: dict[str, Any] = {}
    text = tokenizer.apply_chat_template(
        messages, chat_template=chat_template, tokenize=False, add_generation_prompt=True
    )
    for part in messages[0]["content"]:
        if part["type"] == "image":
            hf_processor = kind.from_pretrained(directory)
            inputs |= hf_processor(images=[part["image"]], return_tensors="pt")
            count = int(inputs["image_grid_thw"].prod()) // hf_processor.merge_size**2
            text = text.replace(IMAGE_PAD, IMAGE_PAD * count)
    inputs |= tokenizer([text], return_tensors="pt")
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == tokenizer.convert_tokens_to_ids(IMAGE_PAD)).to(torch.int32)
    return inputs


def _modules(model: Any) -> Iterator[tuple[str, Any]]:
    """(layer name, module) in the order in which a prompt passes them."""
    visual, text = model.model.visual, model.model.language_model
    yield from ((f"vision.blocks.{i}", block) for i, block in enumerate(visual.blocks))
    yield "vision.merger", visual.merger
    yield from ((f"text.blocks.{i}", block) for i, block in enumerate(text.layers))
    yield "text.norm", text.norm
    yield "logits", model.lm_head


def _keep(layers: dict[str, np.ndarray], name: str, _module: Any, _inputs: Any, output: Any) -> None:
    _keep_input(layers, name, _module, output if isinstance(output, tuple) else (output,))


def _keep_input(layers: dict[str, np.ndarray], name: str, _module: Any, inputs: tuple) -> None:
    layers[name] = inputs[0].detach().float().reshape(-1, inputs[0].shape[-1]).numpy().copy()


# ---------------------------------------------------------------- ours


def observe_ours(directory: Path, processor: Processor, dtype: str, max_new_tokens: int) -> dict[str, Observed]:
    """Both prompts through our model."""
    from latent_jax.inference.vlm import eos_ids

    config = dataclasses.replace(
        from_json(directory / "config.json"), image_mean=processor.image.mean, image_std=processor.image.std
    )
    structure = Structure.of(nnx.eval_shape(lambda: Qwen2_5_VL(config, rngs=nnx.Rngs(0))))
    model = structure.build(hf_io.load(directory, config, dtype=jnp.dtype(dtype)))
    eos = eos_ids(directory, processor.tokenizer, config.text.vocab_size)
    found = {}
    # By default accelerators multiply fp32 matrices in TF32 or bfloat16.
    with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
        for name, messages in prompts().items():
            rows = one_per_row([processor.lay_out(processor.render(messages, True))], config)
            given = jnp.zeros((1, config.text.hidden_size))
            layers = _named(config, _activations(model, rows.batch, given, rows.image_patches), rows)
            (answer,) = decode.generate(LatentVLM(model, None), rows, given, eos, max_new_tokens=max_new_tokens)
            found[name] = Observed(layers, answer.ids)
    del model
    gc.collect()
    return found


@functools.partial(jax.jit, static_argnames="image_patches")
def _activations(model: Qwen2_5_VL, batch: dict, given: jax.Array, image_patches: int) -> dict[str, jax.Array]:
    """Every layer's output; vision blocks and text blocks stacked along a leading L."""
    found: dict[str, jax.Array] = {}
    features = given[None]
    if batch["patches"].shape[1]:
        merged, _, blocks = model.encode(batch, image_patches=image_patches, collect=True)
        patches = model.vision.embed(batch["patches"], model.config.image_mean, model.config.image_std)
        found = {"vision.patch": patches[0], "vision.merger": merged[0]}
        found |= {} if blocks is None else {"vision.blocks": blocks[:, 0]}
        features = merged
    x = model.embed(batch["tokens"], batch["feature_index"], features)
    hidden, layers = model.decode(x, batch, collect=True)
    found |= {} if layers is None else {"text.blocks": layers[:, 0, 0]}
    return found | {"text.norm": hidden[0, 0], "logits": model.logits(hidden)[0, 0]}


def _named(config: ModelConfig, found: dict[str, jax.Array], rows: PromptBatch) -> dict[str, np.ndarray]:
    """Activations by layer name without padding. Patches stand in window order on both sides."""
    patches = int((rows.batch["patch_image"] > 0).sum())
    real = {"vision": patches, "vision.merger": patches // config.vision.merge_unit}
    named: dict[str, np.ndarray] = {}
    for name, array in found.items():
        count = real.get(name, real["vision"] if name.startswith("vision") else int(rows.lengths[0]))
        values = np.asarray(array.astype(jnp.float32))[..., :count, :]
        named |= {f"{name}.{i}": layer for i, layer in enumerate(values)} if name.endswith("blocks") else {name: values}
    return named


# ---------------------------------------------------------------- compared


def _compared(dtype: str, prompt: str, ours: Observed, theirs: Observed, exact: Observed) -> Comparison:
    judged = exact.layers if dtype == "bfloat16" else {}
    lengths = [len(side.layers["logits"]) for side in (ours, theirs)]
    if lengths[0] != lengths[1]:
        raise UserError(
            f"prompt '{prompt}': {lengths[0]} tokens here, {lengths[1]} in transformers; the checkpoint's "
            "tokenizer or preprocessor files are read differently"
        )
    layers = [_layer(name, ours.layers[name], want, judged.get(name)) for name, want in theirs.layers.items()]
    length = min(len(ours.tokens), len(theirs.tokens))
    parts_at = next((i for i in range(length) if ours.tokens[i] != theirs.tokens[i]), None)
    if parts_at is None and len(ours.tokens) != len(theirs.tokens):
        parts_at = length
    margin = None if parts_at is None else theirs.margins[min(parts_at, len(theirs.margins) - 1)]
    return Comparison(dtype, prompt, tuple(layers), ours.tokens, theirs.tokens, parts_at, margin)


def _layer(name: str, ours: np.ndarray, theirs: np.ndarray, exact: np.ndarray | None) -> Layer:
    a, b = (x.astype(np.float64) for x in (ours, theirs))
    largest = max(np.abs(b).max(), np.finfo(np.float32).tiny)
    cosine = (a * b).sum() / max(np.sqrt((a**2).sum() * (b**2).sum()), np.finfo(np.float32).tiny)
    yardstick = ratio = None
    if exact is not None:
        error = b - exact
        yardstick = float(np.abs(error).max() / largest)
        ratio = float(np.sqrt(((a - b) ** 2).mean()) / max(np.sqrt((error**2).mean()), 1e-30))
    worst = float(np.abs(a - b).max())
    return Layer(name, worst, float(worst / largest), float(cosine), yardstick, ratio)
