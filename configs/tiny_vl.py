"""The embedded tiny model: a vision-language model of a million weights, trained from scratch on the embedded scenes.

    make tiny_vl
"""

from latent_jax.config import default


def get_config():
    config = default("sft")
    config.model.init = "random"
    config.model.preset = "tiny"
    config.model.trainable = "all"
    config.data.replay = 0.5
    config.train.steps = 3000
    config.train.batch_size = 64
    config.train.learning_rate = 1e-3
    return config
