r"""Latent pretraining: captions teach the language model to predict its own vision encoder's latents.

    python -m latent_jax.main --config=configs/pretrain.py --workdir=runs/pretrain
    python -m latent_jax.main --config=configs/pretrain.py:qwen2_5_vl_7b --workdir=runs/pretrain_7b \
        --config.data.name=coco_captions --config.data.path=PREPARED

The first trains the embedded model on the embedded scenes (`make pretrain`): expect a cosine of .89 on informative and
on empty held-out cells, recall@1 .96 (chance .004), and an imagined probe of 62 % beside 25 over mean latents, in a
minute on two CPU cores. Answers over true images get worse (86.8 to 76.1 %), and no gain after fine-tuning was found.
The others start from the published checkpoints and have not been run at full size yet.

On your own photos no numbers are known, and those of scenes are no measure: their captions say all that is in the
image. Hold the cosine to the true latent against that to another image's, and recall against its chance; both should
grow apart from them. A norm ratio below 1 and an effective rank below the true one are what captions that leave much
open should give; a rank near 1 is a collapse. Without questions about the held-out images there is no probe. The
report needs a held-out split (config.evaluate.split); neighbours.png in the workdir shows images to judge by eye.

With --config.data.latent_cache=DIR the targets are encoded once, and training runs the encoder on replayed images
only: one more pass over the images, which pays where they are visited often and the encoder is a large share of a step
(docs/performance.md).
"""

from latent_jax.config.schema import default
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
        published(config, variant)
    else:
        embedded(config)
    return config


def embedded(config):
    """Two cores, a few minutes. Its captions are the full descriptions, from which the image could be drawn again."""
    config.model.unroll = 4
    config.mesh.cpu_devices = 2
    config.mesh.replica, config.mesh.fsdp = -1, 1
    config.data.row_tokens = 256
    config.latent.grid = 4  # 112-pixel images have 4 x 4 merged tokens: the full grid
    config.latent.captions = "first"
    config.loss.similarity_weight = 3.0
    config.train.steps = 500
    config.train.batch_size = 32
    config.train.learning_rate = 1e-3
    config.train.weight_decay = 0.01
    config.train.beta2 = 0.98
    config.checkpoint.every = 250


def published(config, variant: str):
    """The published models, at 336 pixels a side or as many pixels in another shape: 12 x 12 merged tokens."""
    if variant not in PUBLISHED:
        raise UserError(f"configs/pretrain.py: no variant {variant!r}; expected one of {', '.join(PUBLISHED)}")
    config.model.path, config.train.batch_size, config.train.learning_rate = PUBLISHED[variant]
    config.model.preset = variant
    config.data.name = "coco_captions"
    config.data.max_pixels = 336 * 336
    config.latent.grid = 12
    config.train.head_learning_rate = 1e-4
    config.train.steps = 5000
