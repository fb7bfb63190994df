"""Writes a Hugging Face checkpoint from a workdir, one of its checkpoint steps, or another HF checkpoint.

    python -m latent_jax.convert --checkpoint=runs/pretrain --output=exported [--step=500] [--dtype=bfloat16]

The output loads in stock transformers with no remote code. It keeps the source checkpoint's dtypes unless told.
"""

import os
import shlex
from pathlib import Path

import jax.numpy as jnp

from latent_jax import methods
from latent_jax.config import schema
from latent_jax.data.image_spec import ImageSpec
from latent_jax.errors import UserError
from latent_jax.models import hf_export, hf_io
from latent_jax.models.origin import PROCESSORS
from latent_jax.models.qwen2_5_vl.config import from_json
from latent_jax.runtime.command import Parser, command, say_line
from latent_jax.training import latent_config
from latent_jax.training.workdir import (
    CHECKPOINTS,
    CONFIG,
    ORIGIN,
    Run,
    card,
    is_workdir,
    named_step,
    numbers,
    read_finished,
    split,
)


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
    _check_place(output)
    hf_export.check_replaceable(output)  # before anything large is read
    path, (workdir, named) = Path(os.path.realpath(checkpoint)), named_step(checkpoint)
    if named is not None:
        if step not in (None, named):
            raise UserError(f"--step={step}: --checkpoint={checkpoint} already names a step")
        export_workdir(workdir, output, named, dtype)
    elif is_workdir(path):
        export_workdir(Path(checkpoint), output, step, dtype)
    elif step is not None:
        raise UserError(f"--step={step}: {checkpoint} is no workdir (it has no checkpoints/), so it has no steps")
    else:
        export_hf(checkpoint, output, dtype)


def _check_place(output: Path) -> None:
    """Raises UserError where an export would be taken for a checkpoint of a run, or for what it began with."""
    place = Path(os.path.realpath(output))
    for parent in place.parents:
        if is_workdir(parent) and place.relative_to(parent).parts[0] in (CHECKPOINTS, ORIGIN):
            raise UserError(
                f"--output={output}: stands among the files of the run {parent}; expected another directory"
            )


def export_hf(source: str | Path, output: Path, dtype: str | None = None) -> None:
    """A round trip, straight from file to file: no weight is ever held whole."""
    checkpoint = hf_io.Checkpoint.open(source)
    config = from_json(checkpoint.directory / "config.json")
    weights = checkpoint.weights(config)
    notes = hf_export.save(
        output,
        weights,
        config,
        source=checkpoint.directory,
        dtype=dtype and jnp.dtype(dtype),
        keep_not_finite=dtype is None,
    )
    for note in [*notes, f"{output}: HF checkpoint of {source}"]:
        say_line(note)


def export_workdir(workdir: Path, output: Path, step: int | None = None, dtype: str | None = None) -> None:
    """A training run's checkpoint (the newest, or `step`) as an HF checkpoint with its latent head beside it."""
    run = Run.of(workdir)
    done, step = read_finished(workdir), run.newest() if step is None else step
    limits, notes = pixel_limits(run)
    vlm, head = split(run.arrays(step))
    head = latent_config.head(methods.find(run.config.method), head)
    latent = latent_config.beside(run.config, head)
    found = numbers(done["report"]) if done.get("step") == step else {}
    words = ["python", "-m", "latent_jax.convert", f"--checkpoint={workdir}", f"--step={step}", f"--output={output}"]
    words += [f"--dtype={dtype}"] if dtype else []
    commands = [line for line in (done.get("command"), shlex.join(words)) if line]
    notes += hf_export.save(
        output,
        vlm,
        run.model_config,
        source=run.origin,
        dtype=dtype and jnp.dtype(dtype),
        latent=latent,
        limits=limits,
        card=card(run.config, step, found, "\n".join(commands), run.origin).text(bool(head)),
    )
    for note in [*notes, f"{output}: HF checkpoint of step {step} of {workdir}"]:
        say_line(note)


def pixel_limits(run: Run) -> tuple[dict[str, int], list[str]]:
    """(limits of training that the export must state since the run's kept files do not, lines worth saying).

    Runs of today keep theirs in hf_files; earlier ones had them in config.json alone, or nowhere.
    """
    if not any((run.origin / name).exists() for name in PROCESSORS):
        return {}, []
    kept, names = ImageSpec.from_directory(run.origin), ("min_pixels", "max_pixels")
    known = schema.read_all(run.directory / CONFIG)["data"]
    if any(name not in known for name in names):
        stands = ", ".join(f"{name} {getattr(kept, name)}" for name in names)
        return {}, [
            f"{run.directory / CONFIG}: does not say at which pixel limits the run trained; the export keeps those of "
            f"the checkpoint that it began with ({stands})"
        ]
    wanted = {name: getattr(run.config.data, name) for name in names}  # 0: the checkpoint's
    limits = {name: value for name, value in wanted.items() if value not in (0, getattr(kept, name))}
    stated = ", ".join(f"{name} {value}" for name, value in limits.items())
    return limits, [f"the export states the pixel limits of training: {stated}"] if limits else []


if __name__ == "__main__":
    main()
