"""The job `evaluate` with a stock transformers model instead of ours; everything else is the same.

python -m third_party.evaluate --config=configs/evaluate.py --config.benchmark=NAME --config.data.path=PREPARED
    --config.model.path=DIR --workdir=DIR
"""

import sys

from absl import flags

from latent_jax import main as command
from latent_jax.errors import UserError
from latent_jax.runtime.command import command as as_command


@as_command
def main(arguments: list[str]) -> None:
    """Exits with status 2 and one line on standard error for bad input."""
    config, workdir = command.parse(arguments)
    if config.job != "evaluate":
        raise UserError(f"config.job: got {config.job!r}; expected a config of the job 'evaluate'")
    if config.evaluate.imagine:
        raise UserError("config.evaluate.imagine: got true; stock models have no latents, use latent_jax.main")
    flags.FLAGS.mark_as_parsed()
    from latent_jax import evaluate
    from third_party.backend import open_backend

    evaluate.run(config, workdir, open_backend)


if __name__ == "__main__":
    main(sys.argv[1:])
