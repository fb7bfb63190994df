"""Turns a dataset in its official on-disk form into ArrayRecord files, through a TFDS builder.

python -m latent_jax.prepare --dataset=NAME --raw=DIR --output=DIR [--workers=N] [--max_bad=SHARE]
python -m latent_jax.prepare --dataset=scenes --output=DIR [--seed=0] [--size=6000] [--placement=grid]
python -m latent_jax.prepare --dataset=scenes_blink --output=DIR [--seed=0] [--size=1000]

NAME is coco_captions, conceptual_captions, laion, gqa, scienceqa, blink, vstar, mmvp or vsp; the module of that name in
data/builders says which files it expects. Run again after a kill, it goes on where it was.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from latent_jax.data import scenes
from latent_jax.data.builders.build import BUILDERS, MAX_BAD, build, build_scenes, build_scenes_benchmark
from latent_jax.errors import UserError
from latent_jax.runtime.command import Parser, command

_MADE = ("scenes", *(f"scenes_{name}" for name in scenes.BENCHMARK_SIZES))


def prepare(flags: argparse.Namespace) -> None:
    """Does what the flags say; the output appears only when it is complete."""
    sizes = {"train": flags.size} if flags.size is not None else {}
    if flags.dataset == "scenes":
        build_scenes(
            flags.output,
            seed=flags.seed,
            sizes={**scenes.SIZES, **sizes},
            placement=flags.placement,
            objects=tuple(flags.objects),
            striped=flags.striped,
        )
        return
    if flags.dataset in _MADE:
        name = flags.dataset.removeprefix("scenes_")
        sizes = {**scenes.BENCHMARK_SIZES[name], **sizes}
        build_scenes_benchmark(name, flags.output, seed=flags.seed, sizes=sizes)
        return
    if flags.raw is None:
        raise UserError(f"--dataset={flags.dataset} needs --raw=DIR, the folder of its official files")
    lines = build(flags.dataset, flags.raw, flags.output, max_bad=flags.max_bad, workers=flags.workers)
    for line in lines:
        print(line, file=sys.stderr)
    found = sorted(Path(flags.output, flags.dataset).glob("*/skipped.jsonl"))
    if found and found[-1].stat().st_size:
        print(f"everything that was skipped: {found[-1]}", file=sys.stderr)
    print(f"next: {_next(flags)}", file=sys.stderr)


def _next(flags: argparse.Namespace) -> str:
    """The command that uses what was prepared."""
    if flags.dataset in ("coco_captions", "conceptual_captions", "laion"):
        what = f"--config=configs/pretrain.py --config.data.name={flags.dataset}"
    else:
        what = f"--config=configs/evaluate.py --config.benchmark={flags.dataset}"
    return f"python -m latent_jax.main {what} --config.data.path={flags.output} --workdir=runs/{flags.dataset}"


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 after one line on what is wrong with the input."""
    parser = Parser(prog="python -m latent_jax.prepare", description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", required=True, choices=[*BUILDERS, *_MADE])
    parser.add_argument("--raw", metavar="DIR", help="the dataset's official files")
    parser.add_argument("--output", required=True, metavar="DIR", help="where the prepared dataset shall appear")
    parser.add_argument(
        "--max_bad",
        type=float,
        default=MAX_BAD,
        metavar="SHARE",
        help="most images, captions or questions that may be unusable (default %(default)s)",
    )
    parser.add_argument("--workers", type=int, metavar="N", help="threads (default: one a core)")
    world = parser.add_argument_group("scenes")
    world.add_argument("--seed", type=int, default=0)
    world.add_argument("--size", type=int, metavar="N", help="size of the training split")
    world.add_argument("--placement", choices=["grid", "free"], default="grid")
    world.add_argument("--objects", type=int, nargs=2, default=[2, 4], metavar=("LEAST", "MOST"))
    world.add_argument("--striped", type=float, default=0.0, metavar="SHARE", help="share of striped things")
    prepare(parser.parse_args(arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main())
