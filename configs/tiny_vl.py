"""The embedded tiny model: a vision-language model of a million weights, trained from scratch on the embedded scenes.

Two stages, `captions` and then `questions` from its result: learning both at once from scratch is much slower.

    make tiny_vl
"""

from latent_jax.config import default
from latent_jax.errors import UserError

STAGES = ("captions", "questions")


def get_config(stage: str = "captions"):
    if stage not in STAGES:
        raise UserError(f"configs/tiny_vl.py: no variant {stage!r}; expected one of {', '.join(STAGES)}")
    config = default("sft")
    config.model.trainable = "all"
    config.data.row_tokens = 128
    config.train.batch_size = 64
    config.train.weight_decay = 0.01
    config.train.beta2 = 0.98
    if stage == "captions":
        config.model.init = "random"
        config.model.preset = "tiny"
        config.train.steps = 1500
        config.train.learning_rate = 2e-3
    else:
        config.data.name = "scenes_questions:0.85,scenes:0.15"
        config.train.steps = 4000
        config.train.learning_rate = 1.5e-3
    return config
