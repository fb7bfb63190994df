"""Writes a Hugging Face checkpoint from a workdir, one of its checkpoint steps, or another HF checkpoint.

    python -m latent_jax.convert --checkpoint=runs/pretrain --output=exported [--step=500] [--dtype=bfloat16]

The output loads in stock transformers with no remote code. It keeps the source checkpoint's dtypes unless told.
"""

import os
from pathlib import Path

import jax.numpy as jnp

from latent_jax.command import Parser, command
from latent_jax.errors import UserError
from latent_jax.models import hf_export, hf_io
from latent_jax.models.qwen2_5_vl.config import from_json
from latent_jax.workdir import Run, card, is_workdir, named_step, split


@command
def main(arguments: list[str] | None = None) -> None:
    """The command: exits with status 2 and one line on standard error for bad input."""
    parser = Parser(prog="python -m latent_jax.convert", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="a workdir, a step under its checkpoints/, an HF directory or a hub id",
    )
    parser.add_argument(
        "--output",
        required=True,
        type=Path,
        metavar="HF_DIR",
        help="new or empty directory, or an earlier export to replace",
    )
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint step of the workdir; default: the newest")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the source checkpoint's")
    options = parser.parse_args(arguments)
    convert(options.checkpoint, options.output, options.step, options.dtype)


def convert(checkpoint: str, output: Path, step: int | None = None, dtype: str | None = None) -> None:
    """Writes `output` from whichever of the three that `checkpoint` is. Raises UserError where it is none of them."""
    hf_export.check_replaceable(output)  # before anything large is read
    path, (workdir, named) = Path(os.path.realpath(checkpoint)), named_step(checkpoint)
    if named is not None:
        if step not in (None, named):
            raise UserError(f"--step={step}: --checkpoint={checkpoint} already names a step")
        export_workdir(workdir, output, named, dtype)
    elif is_workdir(path):
        export_workdir(path, output, step, dtype)
    elif step is not None:
        raise UserError(f"--step={step}: {checkpoint} is no workdir (it has no checkpoints/), so it has no steps")
    else:
        export_hf(checkpoint, output, dtype)


def export_hf(source: str | Path, output: Path, dtype: str | None = None) -> None:
    """A round trip, straight from file to file: no weight is ever held whole."""
    checkpoint = hf_io.Checkpoint.open(source)
    config = from_json(checkpoint.directory / "config.json")
    weights = checkpoint.weights(config)
    hf_export.save(
        output,
        weights,
        config,
        source=checkpoint.directory,
        dtype=dtype and jnp.dtype(dtype),
        keep_not_finite=dtype is None,
    )


def export_workdir(workdir: Path, output: Path, step: int | None = None, dtype: str | None = None) -> None:
    """A training run's checkpoint (the newest, or `step`) as an HF checkpoint with its latent head beside it."""
    run = Run.of(workdir)
    vlm, head = split(run.arrays(step))
    latent = (head, run.latent()) if head else None
    hf_export.save(
        output,
        vlm,
        run.model_config,
        source=run.origin,
        dtype=dtype and jnp.dtype(dtype),
        latent=latent,
        card=card(run.config, run.newest() if step is None else step, {}).text(bool(head)),
    )


if __name__ == "__main__":
    main()
