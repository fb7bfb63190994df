"""A method of one's own: S pause tokens (Goyal et al., 2023, arXiv:2310.02226), here between a question and its answer.

python -m latent_jax.main --config=examples/own_config.py --workdir=runs/pauses
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from latent_jax.config.fields import option
from latent_jax.data.layout import Layout, Room, Slots, Text, with_learned_slots
from latent_jax.data.messages import imagine_parts
from latent_jax.methods import sft
from latent_jax.methods.contract import Think
from latent_jax.models.parameters import Declare


@dataclasses.dataclass(frozen=True)
class Pause:
    count: int = option(4, "pause tokens after a question", low=1, high=1024)


@dataclasses.dataclass(frozen=True)
class PauseConfig(sft.SftConfig):
    pause: Pause = Pause()


class Pauses(nnx.Module):  # the head: S embeddings, which all questions share
    def __init__(self, count: int, hidden: int, rngs: nnx.Rngs):
        self.embeddings = Declare(dict(S=count, D=hidden), rngs, jnp.float32).normal("S D", "D", decay=False)


def layout(record, index, config, processor):  # host: the questions as `sft` shows them, slots before each answer
    shown = sft.conversations(record, index, config, imagine=True)
    layout = processor.render_conversations(shown, imagined_grid=config.pause.count, key=record["key"])
    return with_learned_slots(layout)


def loss(model, batch, config):  # device: next token of the answers; G groups
    options = dict(remat=config.model.remat, unroll=config.model.unroll)
    merged, _, _ = model.vlm.encode(batch, image_patches=config.data.image_patches, **options)
    pauses = jnp.tile(model.head.embeddings[...], (len(merged), config.chat.questions, 1)).astype(merged.dtype)
    x = model.vlm.embed(batch["tokens"], batch["feature_index"], jnp.concatenate([merged, pauses], axis=1))
    return sft.scored(model, x, batch, options)


METHOD = dataclasses.replace(  # coefficients, weights and the rest are those of `sft`
    sft.METHOD, config=PauseConfig, layout=layout, loss=loss, head_settings=("pause.count",),
    room=lambda config: Room(slots=config.pause.count * config.chat.questions),
    build_head=lambda model, config, rngs: Pauses(config.pause.count, model.text.hidden_size, rngs),
    think=Think(  # for X parts that ask for latents: nothing is computed, the pauses are there
        shape=lambda config: config.pause.count,
        layouts=lambda messages, config, *_: [Layout(trunk=(Text("<|im_start|>"), Slots(config.pause.count)))]
        * len(imagine_parts(messages)),
        run=lambda model, batch, config, keys, _: (jnp.tile(model.head.embeddings[...], (len(keys), 1, 1)),) * 2,
        answers=True,
    ),
)  # fmt: skip
