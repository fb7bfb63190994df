r"""Supervised fine-tuning on questions about images: the loss is on the answers only.

    python -m latent_jax.main --config=configs/finetune.py --workdir=runs/finetune \
        --config.model.path=runs/pretrain/hf
    python -m latent_jax.main --config=configs/finetune.py:qwen2_5_vl_7b --workdir=runs/finetune_7b \
        --config.model.path=DIR --config.data.name=gqa --config.data.path=PREPARED

The first fine-tunes the embedded model, or what latent pretraining made of it, on the embedded questions: after `make
pretrain` expect a loss near .4 and, by configs/evaluate.py, 57.4 % of GQA's form of questions with GQA's own prompt,
which the embedded model had not seen before (.33 %); three minutes on two CPU cores, and half a minute. A variant may
end in `_imagine` (or be just `imagine`): the model then predicts latents after each question and answers over them
(docs/methods.md); after published pretraining add --config.latent.grid=12. The published sizes have not been run at
full size yet. It ends with an HF checkpoint; what it can do says an evaluation (configs/evaluate.py) of WORKDIR/hf, for
`_imagine` with the latents that it thinks.
"""

from latent_jax.config.schema import default
from latent_jax.errors import UserError

# Variant -> (hub id, examples a step, peak learning rate).
PUBLISHED = {
    "qwen2_5_vl_3b": ("Qwen/Qwen2.5-VL-3B-Instruct", 128, 1e-5),
    "qwen2_5_vl_7b": ("Qwen/Qwen2.5-VL-7B-Instruct", 128, 1e-5),
    "qwen2_5_vl_32b": ("Qwen/Qwen2.5-VL-32B-Instruct", 128, 5e-6),
    "qwen2_5_vl_72b": ("Qwen/Qwen2.5-VL-72B-Instruct", 128, 5e-6),
}


def get_config(variant: str = ""):
    model = variant.removesuffix("imagine").removesuffix("_")
    config = default("imagine" if variant.endswith("imagine") else "sft")
    if model:
        published(config, model, variant)
    else:
        embedded(config)
    return config


def embedded(config):
    """Two cores, a few minutes. Gentle: a higher rate undoes what pretraining taught."""
    config.data.name = "scenes_questions"
    config.data.row_tokens = 128
    config.model.unroll = 4
    config.mesh.cpu_devices = 2
    config.mesh.replica, config.mesh.fsdp = -1, 1
    config.train.steps = 300
    config.train.batch_size = 16
    config.train.learning_rate = 2e-4
    config.train.weight_decay = 0.01
    config.train.beta2 = 0.98


def published(config, model: str, variant: str):
    """The published models, on GQA with its own prompt."""
    if model not in PUBLISHED:
        raise UserError(
            f"configs/finetune.py: no variant {variant!r}; expected imagine, or one of {', '.join(PUBLISHED)}, "
            "with or without _imagine behind it"
        )
    config.model.path, config.train.batch_size, config.train.learning_rate = PUBLISHED[model]
    config.model.preset = model
    config.data.name = "gqa"
    config.data.max_pixels = 448 * 448
    config.train.steps = 5000
