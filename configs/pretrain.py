"""Latent pretraining: captions teach the language model to predict its own vision encoder's latents.

python -m latent_jax.main --config=configs/pretrain.py
python -m latent_jax.main --config=configs/pretrain.py:qwen2_5_vl_7b --workdir=runs/pretrain_7b --config.data.name=coco
"""

from latent_jax.config import default
from latent_jax.errors import UserError

# Variant -> (hub id, examples a step, peak learning rate).
PUBLISHED = {
    "qwen2_5_vl_3b": ("Qwen/Qwen2.5-VL-3B-Instruct", 256, 1e-5),
    "qwen2_5_vl_7b": ("Qwen/Qwen2.5-VL-7B-Instruct", 256, 1e-5),
    "qwen2_5_vl_32b": ("Qwen/Qwen2.5-VL-32B-Instruct", 512, 5e-6),
    "qwen2_5_vl_72b": ("Qwen/Qwen2.5-VL-72B-Instruct", 512, 5e-6),
}


def get_config(variant: str = ""):
    config = default("pretrain")
    if variant:
        if variant not in PUBLISHED:
            raise UserError(f"configs/pretrain.py: no variant {variant!r}; expected one of {', '.join(PUBLISHED)}")
        config.model.path, config.train.batch_size, config.train.learning_rate = PUBLISHED[variant]
        config.model.preset = variant
    return config
