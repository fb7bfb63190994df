"""A method of one's own: pause tokens (Goyal et al., 2023, arXiv:2310.02226), here between a question and its answer.

    python -m latent_jax.main --config=examples/own_config.py --workdir=runs/pauses

S learned embeddings follow each question. The model computes over them before it answers, and the loss is on the answer
alone. The head is these embeddings. An evaluation, or a part {"type": "imagine"}, puts them into a prompt by `think`.
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from latent_jax.config.fields import option
from latent_jax.config.training import Config
from latent_jax.data.layout import Layout, Room, Slots, Text, with_learned_slots
from latent_jax.data.messages import imagine_parts
from latent_jax.methods import sft
from latent_jax.methods.contract import Method, Think
from latent_jax.models.parameters import Declare


@dataclasses.dataclass(frozen=True)
class Pause:
    count: int = option(4, "pause tokens after a question", low=1, high=1024)


@dataclasses.dataclass(frozen=True)
class PauseConfig(Config):
    pause: Pause = Pause()
    loss: sft.Loss = sft.Loss()
    chat: sft.Chat = sft.Chat()


class Pauses(nnx.Module):
    def __init__(self, count: int, hidden: int, rngs: nnx.Rngs):
        declare = Declare(dict(S=count, D=hidden), rngs, jnp.float32)
        self.embeddings = declare.normal("S D", "D", decay=False)


def layout(record, index, config, processor) -> Layout:
    """Host half: the record's questions as `sft` shows them, with slots before each answer."""
    shown = sft.conversations(record, index, config, imagine=True)
    return with_learned_slots(
        processor.render_conversations(shown, imagined_grid=config.pause.count, key=record["key"])
    )


def loss(model, batch, config):
    """Device half: next token of the answers. All questions have the same pauses, tiled to (G, questions * S, D)."""
    options = dict(remat=config.model.remat, unroll=config.model.unroll)
    merged, _, _ = model.vlm.encode(batch, image_patches=config.data.image_patches, **options)
    pauses = jnp.tile(model.head.embeddings[...], (len(merged), config.chat.questions, 1)).astype(merged.dtype)
    features = jnp.concatenate([merged, pauses], axis=1)
    return sft.scored(model, model.vlm.embed(batch["tokens"], batch["feature_index"], features), batch, options)


def think_layouts(messages, config, processor, variant) -> list[Layout]:
    """Nothing is computed before the answer: a shortest sequence for each part that asks for pauses."""
    return [Layout(trunk=(Text("<|im_start|>"), Slots(config.pause.count))) for _ in imagine_parts(messages)]


def think(model, batch, config, keys, temperature):
    """(latents (X, S, D) float32, inputs (X, S, D)): the same pauses for all X."""
    pauses = jnp.tile(model.head.embeddings[...], (len(keys), 1, 1))
    return pauses.astype(jnp.float32), pauses


METHOD = Method(
    config=PauseConfig,
    layout=layout,
    coefficients=sft.coefficients,
    weights=sft.weights,
    loss=loss,
    room=lambda config: Room(slots=config.pause.count * config.chat.questions),
    build_head=lambda model, config, rngs: Pauses(config.pause.count, model.text.hidden_size, rngs),
    head_settings=("pause.count",),
    think=Think(lambda config: config.pause.count, think_layouts, think, answers=True),
)
