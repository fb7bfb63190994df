r"""Evaluation on a benchmark, with its official prompt, parser and scorer.

    python -m latent_jax.main --config=configs/evaluate.py --config.evaluate.prompt='{question}' \
        --workdir=runs/evaluate
    python -m latent_jax.main --config=configs/evaluate.py --config.benchmark=gqa --config.data.path=PREPARED \
        --config.model.path=Qwen/Qwen2.5-VL-7B-Instruct --workdir=runs/gqa_7b

The first asks the embedded model GQA's form of questions about the embedded scenes, bare as it was taught: accuracy
86.78. Behind the official instruction, which it never saw, it has 0.33. In the second, PREPARED is the
--output of latent_jax.prepare, and the model an HF directory, a hub id or a workdir. Benchmarks: gqa, scienceqa, blink,
vstar, mmvp, vsp; config.evaluate.scorer chooses between `official` and `lmms_eval`. A killed run goes on where it was.
"""

from latent_jax.config.schema import default_evaluation


def get_config():
    return default_evaluation()
