r"""Trains examples/own_method.py on the embedded questions, from the embedded model: minutes on two CPU cores.

    python -m latent_jax.main --config=examples/own_config.py --workdir=runs/pauses
    python -m latent_jax.main --config=configs/evaluate.py --config.model.path=runs/pauses/hf --workdir=runs/pauses_gqa

Run both in the folder that holds examples/: Python finds a method by its dotted name there.
"""

from latent_jax.config.schema import default


def get_config():
    config = default("examples.own_method")
    config.pause.count = 4
    config.data.name = "scenes_questions"
    config.data.row_tokens = 256
    config.train.steps = 300
    config.train.batch_size = 16
    return config
