"""Turns a dataset in its official on-disk form into ArrayRecord files, through a TFDS builder.

python -m latent_jax.prepare --dataset=coco_captions --raw=DIR --output=DIR
python -m latent_jax.prepare --dataset=gqa --raw=DIR --output=DIR
python -m latent_jax.prepare --dataset=scenes --output=DIR [--seed=0] [--size=6000] [--placement=grid]
"""

import argparse
import sys
from collections.abc import Sequence

from latent_jax.data import scenes
from latent_jax.data.builders.build import BUILDERS, MAX_BAD, build, build_scenes
from latent_jax.errors import UserError


def prepare(flags: argparse.Namespace) -> None:
    """Does what the flags say; the output appears only when it is complete."""
    if flags.dataset == "scenes":
        sizes = {"train": flags.size} if flags.size is not None else {}
        build_scenes(
            flags.output,
            seed=flags.seed,
            sizes={**scenes.SIZES, **sizes},
            placement=flags.placement,
            objects=tuple(flags.objects),
            striped=flags.striped,
        )
        return
    if flags.raw is None:
        raise UserError(f"--dataset={flags.dataset} needs --raw=DIR, the folder of its official files")
    for line in build(flags.dataset, flags.raw, flags.output, max_bad=flags.max_bad):
        print(line, file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 after one line on what is wrong with the input."""
    parser = argparse.ArgumentParser(prog="python -m latent_jax.prepare", description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", required=True, choices=[*BUILDERS, "scenes"])
    parser.add_argument("--raw", metavar="DIR", help="the dataset's official files")
    parser.add_argument("--output", required=True, metavar="DIR", help="where the prepared dataset shall appear")
    parser.add_argument(
        "--max_bad",
        type=float,
        default=MAX_BAD,
        metavar="SHARE",
        help="most images, captions or questions that may be unusable (default %(default)s)",
    )
    world = parser.add_argument_group("scenes")
    world.add_argument("--seed", type=int, default=0)
    world.add_argument("--size", type=int, metavar="N", help=f"training scenes (default {scenes.SIZES['train']})")
    world.add_argument("--placement", choices=["grid", "free"], default="grid")
    world.add_argument("--objects", type=int, nargs=2, default=[2, 4], metavar=("LEAST", "MOST"))
    world.add_argument("--striped", type=float, default=0.0, metavar="SHARE", help="share of striped things")
    try:
        prepare(parser.parse_args(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
