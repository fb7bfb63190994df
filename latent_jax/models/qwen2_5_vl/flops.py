"""Model FLOPs utilisation: what a step must compute, over what its devices could.

The convention, everywhere in this project: a multiply-add is two FLOPs; causal attention is halved; recomputation
(remat) and padding do not count; the logits count where they are supervised; a trained tower costs three forward
passes and a frozen one costs one, also below a merger that is trained alone; with adapters (LoRA) no weight gradient
is formed, so that matmuls with weights cost two and attention three; what a method runs the language model's blocks
for beside the pass that is scored counts like it, but without logits; the vision tower is reported apart; peaks are
dense bf16. Norms, rotary angles, softmax and the methods' small heads and adapters are left out (below 1 % at any
published size; of adapters, at rank 16). With padding, full rows of pairs and all logits counted, this module is
within 3.5 % of XLA's count on the tiny model (tested).
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Literal

import numpy as np

from latent_jax.models.qwen2_5_vl.config import ModelConfig, TextConfig, VisionConfig

# Part of jax's device_kind -> dense bf16 FLOP/s of one device, from the vendors' data sheets. The first match counts.
PEAKS = (
    ("A100", 312e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H200", 989e12),
    ("RTX 4090 ", None),  # the slower ones: D, Laptop GPU
    ("RTX 4090", 165.2e12),
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),
    ("TPU v6", 918e12),
)


def peak(device_kind: str) -> float | None:
    """Dense bf16 FLOP/s of one device; None where it is not known (a CPU)."""
    return next((flops for name, flops in PEAKS if name in device_kind), None)


@dataclasses.dataclass(frozen=True)
class Work:
    """What a step computes on, padding left out. Pairs are of a query and a key."""

    tokens: int
    supervised: int
    pairs: float  # causal: a stretch of t tokens has t * t / 2
    patches: int
    window_pairs: int
    image_pairs: int
    channels: int  # numbers in a patch

    def __add__(self, other: "Work") -> "Work":
        summed = {
            field.name: getattr(self, field.name) + getattr(other, field.name) for field in dataclasses.fields(self)
        }
        return Work(**summed | {"channels": self.channels})


def count(batch: Mapping[str, np.ndarray]) -> Work:
    """Counts a host batch, whatever its leading axes: segment_ids and view_ids (..., B, T), patch_* (..., P)."""
    pairs = 0.0
    segments = batch["segment_ids"].reshape(-1, batch["segment_ids"].shape[-1]).astype(np.int64)
    views = batch["view_ids"].reshape(segments.shape).astype(np.int64)
    for lengths in _lengths(segments, views):
        trunk, rest = lengths[0], lengths[1:]
        # A view sees the trunk whole and itself causally.
        pairs += trunk * trunk / 2 + float((rest * rest / 2 + rest * trunk).sum())
    *lead, most = batch["patch_image"].shape
    images = batch["patch_image"].reshape(math.prod(lead), most)  # there may be no room for patches at all
    windows = batch["patch_window"].reshape(images.shape)
    return Work(
        tokens=int((segments > 0).sum()),
        supervised=int((batch["loss_weights"] != 0).sum()),
        pairs=pairs,
        patches=int((images > 0).sum()),
        window_pairs=sum(_squares(ids) for ids in windows),
        image_pairs=sum(_squares(ids) for ids in images),
        channels=int(batch["patches"].shape[-1]),
    )


def text_forward(config: TextConfig, work: Work, passes: int = 1) -> float:
    """FLOPs of the language model's forward passes, of which one has logits."""
    # Scores and weighted values: two products of head size h for each pair and head.
    attention = 2 * 2 * config.num_attention_heads * config.head_size * work.pairs
    return text_matmuls(config, work, passes) + float(passes * config.num_hidden_layers * attention)


def text_matmuls(config: TextConfig, work: Work, passes: int = 1) -> float:
    """The part of `text_forward` that is matmuls with weights, the logits among them."""
    d, f, v = config.hidden_size, config.intermediate_size, config.vocab_size
    n, k, h = config.num_attention_heads, config.num_key_value_heads, config.head_size
    weights = d * n * h + 2 * d * k * h + n * h * d + 3 * d * f
    return float(passes * config.num_hidden_layers * 2 * weights * work.tokens + 2 * d * v * work.supervised)


def vision_forward(config: VisionConfig, work: Work) -> float:
    """FLOPs of the vision tower's forward pass, patch embedding and merger included."""
    d, f = config.hidden_size, config.intermediate_size
    full = len(config.fullatt_block_indexes)
    pairs = full * work.image_pairs + (config.depth - full) * work.window_pairs
    blocks = config.depth * 2 * (4 * d * d + 3 * d * f) * work.patches + 2 * 2 * d * pairs
    return float(2 * work.channels * d * work.patches + blocks) + merger_forward(config, work)


def merger_forward(config: VisionConfig, work: Work) -> float:
    """The merger's part of `vision_forward`."""
    c = config.merge_unit * config.hidden_size
    return 2 * (c * c + c * config.out_hidden_size) * work.patches / config.merge_unit


Learnt = Literal["weights", "adapters", "merger", "nothing"]


@dataclasses.dataclass(frozen=True)
class Ledger:
    """Turns batches and seconds into utilisation.

    Args:
      config: the model's shape.
      device_kind, devices: one device's kind as jax names it, and how many share the step.
      text, vision: what learns of the language model and of the vision tower; nothing = no gradient passes through.
      passes: how often a step runs the language model's blocks over the batch.
    """

    config: ModelConfig
    device_kind: str
    devices: int
    text: Learnt = "weights"
    vision: Learnt = "nothing"
    passes: int = 1

    def flops(self, work: Work) -> tuple[float, float]:
        """FLOPs of a training step on all devices together: (language model, vision tower)."""
        text = (1 if self.text == "nothing" else 3) * text_forward(self.config.text, work, self.passes)
        if self.text == "adapters":
            text -= text_matmuls(self.config.text, work, self.passes)
        vision = (3 if self.vision == "weights" else 1) * vision_forward(self.config.vision, work)
        if self.vision == "merger":
            vision += 2 * merger_forward(self.config.vision, work)
        return text, vision

    def utilisation(self, work: Work, seconds: float) -> dict[str, float]:
        """{"mfu": language model, "mfu_vision": vision tower}, fractions of the peak; {} where it is not known."""
        most = peak(self.device_kind)
        if most is None:
            return {}
        text, vision = self.flops(work)
        return {"mfu": text / (seconds * self.devices * most), "mfu_vision": vision / (seconds * self.devices * most)}


def _lengths(segments: np.ndarray, views: np.ndarray) -> Iterator[np.ndarray]:
    """For each example: the lengths of its trunk and of its views."""
    for segment_row, view_row in zip(segments, views):
        table = np.zeros((segment_row.max(initial=0) + 1, view_row.max(initial=0) + 1), np.int64)
        np.add.at(table, (segment_row, view_row), 1)
        yield from table[1:]


def _squares(ids: np.ndarray) -> int:
    """Pairs inside each id but 0."""
    return int((np.bincount(ids)[1:].astype(np.int64) ** 2).sum())
