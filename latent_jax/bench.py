"""Measures this project beside what else there is, both in one run.

    python -m latent_jax.bench --what=parity [--model=DIR] [--dtype=float32] [--output=FILE]
    python -m latent_jax.bench --what=step|data|load|generate [--against=none] [--model=DIR | --width=1024 --layers=2]
    python -m latent_jax.bench --what=checkpoint --against=none [--width=2048 --layers=9]

`parity` compares a checkpoint layer by layer with stock transformers (torch, on the CPU) in fp32 and bf16, on a
generated picture and on words alone. Run it first on real weights. Exit status: 0 equal, 1 different, 2 bad input.

The others time the same work done by us and by transformers, in turn, and print medians and their ratio: a training
step, encoded images to patches, a checkpoint to arrays and back, a batch of answers. The same weights, examples and
dtype (float32) on both sides; torch is given one thread and one a core, and the better counts. Every number is kept in
runs/bench/WHAT.json, with versions, date and the machine's load. `checkpoint` times a run's checkpoints, with checksums
of their arrays and without.
"""

import argparse
import dataclasses
import importlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

from latent_jax.errors import UserError
from latent_jax.runtime.command import Parser, command

TIMED = ("step", "data", "load", "generate", "checkpoint")


@command
def main(arguments: list[str] | None = None) -> None:
    """The command; see the module's docstring."""
    parser = Parser(prog="python -m latent_jax.bench", description=__doc__.partition("\n")[0])
    parser.add_argument("--what", required=True, choices=("parity", *TIMED), help="what to measure")
    parser.add_argument("--model", default="", metavar="DIR", help="HF directory or hub id; default: the tiny model")
    parser.add_argument(
        "--against",
        choices=("torch", "none"),
        help="what ours is compared with; default: torch, but for checkpoint none",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="parity: only this one; default: both")
    parser.add_argument("--max_new_tokens", type=int, metavar="N", help="parity: 16 unless told; generate: 32")
    parser.add_argument("--width", type=int, default=0, metavar="D", help="random weights of this hidden size instead")
    parser.add_argument(
        "--layers", type=int, default=0, metavar="L", help="and of so many layers; 2 unless told (load: 8)"
    )
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="step: examples a batch; generate: prompts")
    parser.add_argument("--examples", default="mixed", help="step: captions, questions, mixed or views")
    parser.add_argument("--repeats", type=int, default=9, metavar="N", help="timed runs of each side")
    parser.add_argument("--profile", type=Path, metavar="DIR", help="step, generate: write one run's profile")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where to write every number, as JSON")
    options = parser.parse_args(arguments)
    raise SystemExit(measure_parity(options) if options.what == "parity" else measure_time(options))


def measure_time(options: argparse.Namespace) -> int:
    """Times one of TIMED, prints its report and keeps every number. Returns the exit status."""
    from latent_jax.perf import timing
    from latent_jax.runtime import files

    options.max_new_tokens = 32 if options.max_new_tokens is None else options.max_new_tokens
    for name in ("max_new_tokens", "batch", "repeats"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name}: got {getattr(options, name)}, expected at least 1")
    if options.layers and not options.width:
        raise UserError("--layers: expected --width beside it; a checkpoint has as many layers as it has")
    if options.what not in ("load", "checkpoint"):
        options.layers = options.layers or 2
    if options.examples not in ("captions", "questions", "mixed", "views"):
        raise UserError(f"--examples: got {options.examples!r}, expected captions, questions, mixed or views")
    if options.what == "checkpoint" and options.against == "torch":
        raise UserError("--against=torch: a checkpoint has nothing to be compared with but ourselves; expected none")
    options.against = options.against or ("none" if options.what == "checkpoint" else "torch")
    if options.against == "torch":
        timing.need_torch(f"--what={options.what} --against=torch", "--against=none goes without; or ")
    before = timing.circumstances()
    report = importlib.import_module(f"latent_jax.perf.{options.what}").measure(options)
    after = timing.circumstances()["load_average"]
    print("\n".join([report.title, *report.lines]))
    print(f"{before['cores']} cores; load average {before['load_average'][0]} before, {after[0]} after")
    output = options.output or Path("runs") / "bench" / f"{options.what}.json"
    asked = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    content = {"title": report.title, "options": asked, **report.numbers, **before, "load_average_after": after}
    files.write_text(output, json.dumps(content, indent=2) + "\n")
    print(f"every number: {output}")
    return 0


def measure_parity(options: argparse.Namespace) -> int:
    """Prints a table a prompt and dtype and the verdict. Returns the exit status."""
    from latent_jax.perf import parity

    tokens = 16 if options.max_new_tokens is None else options.max_new_tokens
    if tokens < 1:
        raise UserError(f"--max_new_tokens: got {tokens}, expected at least 1")
    dtypes = (options.dtype,) if options.dtype else parity.DTYPES
    found = parity.compare(options.model, dtypes, tokens)
    for comparison in found:
        print("\n".join(_table(comparison)), end="\n\n")
    failures = [f"{each.failed_at} ({each.dtype}, {each.prompt})" for each in found if each.failed_at]
    if options.output:
        _save(
            options.output,
            {
                "model": options.model or "tiny_vl",
                "thresholds": {"float32 relative": parity.TOLERANCE, "bfloat16 ratio": parity.RATIO},
                "verdict": f"FAILED at {failures[0]}" if failures else "ok",
                "comparisons": [dataclasses.asdict(each) | {"failed_at": each.failed_at} for each in found],
            },
        )
    print(
        f"bounds: float32 {parity.TOLERANCE:g} of the layer's largest entry; bfloat16 {parity.RATIO:g} times (rms) "
        "what torch's bfloat16 differs from its float32"
    )
    print(f"parity: FAILED at {failures[0]}" if failures else "parity: ok")
    return 1 if failures else 0


def _table(comparison: Any) -> list[str]:
    """Fixed-width lines: what is compared, a line a layer, the greedy tokens."""
    judged = comparison.dtype == "bfloat16"
    lines = [f"{comparison.dtype}, prompt '{comparison.prompt}': ours against torch"]
    head = f"{'layer':<18} {'max |diff|':>11} {'/ largest':>11} {'cosine':>11}"
    lines.append(head + (f" {'torch bf16/fp32':>16} {'rms ratio':>10}" if judged else ""))
    for layer in comparison.layers:
        line = f"{layer.name:<18} {layer.max_abs:>11.2e} {layer.relative:>11.2e} {layer.cosine:>11.8f}"
        line += f" {layer.yardstick:>16.2e} {layer.ratio:>10.2f}" if judged else ""
        lines.append(line + ("" if layer.ok else "  <- out of bounds"))
    if comparison.parts_at is None:
        return [*lines, f"greedy: {len(comparison.tokens)} tokens, all equal"]
    place = f"token {comparison.parts_at + 1} of {len(comparison.their_tokens)}"
    return [*lines, f"greedy: part at {place}, where theirs won by {comparison.margin:.1e} of the largest logit"]


def _save(path: Path, content: dict) -> None:
    from latent_jax.runtime import files, provenance

    versions = provenance.versions() | {"torch": importlib.metadata.version("torch")}
    files.write_text(path, json.dumps({**content, "versions": versions}, indent=2) + "\n")


if __name__ == "__main__":
    main()
