"""Is one evaluation better than another on the same questions? A paired test between two result directories.

    python -m latent_jax.compare --a=DIR --b=DIR

The difference of the shares of right answers (b - a) with a 95 % interval from a paired bootstrap over images; the
exact McNemar test, which takes questions for independent; and where they share images a sign-flip test over images.
"""

from pathlib import Path

from latent_jax.evaluation.paired import compare
from latent_jax.runtime.command import Parser, command


def table(found: dict) -> list[str]:
    """For people."""
    lines = [
        f"{found['n']:,} questions in {found['clusters']:,} clusters (images or pairs)",
        f"a {found['a']:.2f} %   b {found['b']:.2f} %",
        f"b - a  {found['difference']:+.2f} points, 95 % interval {found['low']:+.2f} to {found['high']:+.2f}",
        f"only a is right: {found['only_a']:,}; only b: {found['only_b']:,}",
        f"exact McNemar test: p = {found['mcnemar']:.3g}",
    ]
    if found["sign_flip"] is not None:
        lines.append(f"sign-flip test over clusters, which share images: p = {found['sign_flip']:.3g}")
    return lines


@command
def main(arguments: list[str] | None = None) -> None:
    """The command: exits with status 2 and one line on standard error for bad input."""
    parser = Parser(prog="python -m latent_jax.compare", description=__doc__.partition("\n")[0])
    parser.add_argument("--a", required=True, type=Path, metavar="DIR", help="workdir of an evaluation")
    parser.add_argument("--b", required=True, type=Path, metavar="DIR", help="another one, of the same questions")
    parser.add_argument("--seed", type=int, default=0, help="of resampling")
    options = parser.parse_args(arguments)
    print("\n".join(table(compare(options.a, options.b, options.seed))))


if __name__ == "__main__":
    main()
