r"""Says, from the target's own compiler, whether a training step fits a machine that is not there, and what it costs.

    python -m latent_jax.plan --config=configs/NAME.py[:VARIANT] --topology=T [--tries=N] [--config.a.b=value ...]

T is a GPU node (a100-40gb:8, a100-80gb:8, h100-80gb:8, h200-141gb:8, rtx4090-24gb:1), several (a100-80gb:4x8, hosts x
GPUs) or a TPU slice (v4:2x2x2, v5e:4x4, v5p:2x2x2, v6e:4x4). The real step is compiled from shapes alone: no weights,
tokenizer, dataset, hub or accelerator. Where it does not fit, --tries (default 3) changes are compiled in search of one
that does. Exit status: 0 with a verdict as the last line, 2 for bad input or a compiler that is not installed.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from latent_jax.config.training import Config
from latent_jax.errors import UserError
from latent_jax.perf import topologies
from latent_jax.runtime.command import Parser, command

if TYPE_CHECKING:
    from latent_jax.perf.planning import Compiled as Compiled
    from latent_jax.perf.planning import Plan as Plan
else:  # it imports jax, before which `topologies.start` must be called
    Compiled = Plan = Any


@command
def main(arguments: list[str] | None = None) -> int:
    """The command; see the module's docstring."""
    parser = Parser(
        prog="python -m latent_jax.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topology", required=True, metavar="T", help="the machine")
    parser.add_argument("--tries", type=int, default=3, metavar="N", help="changes tried where it does not fit")
    options, rest = parser.parse_known_args(arguments)
    topology = topologies.parse(options.topology)
    topologies.start()  # before anything else imports jax
    from latent_jax.main import parse
    from latent_jax.perf import planning

    config, _ = parse(rest)
    if not isinstance(config, Config):
        raise UserError(f"config.job: got {config.job!r}, expected 'train': a plan is of a training step")
    found = planning.plan(config, topology)
    print("\n".join(report(found)), flush=True)
    if not found.fits:
        print("\n".join(advice(found, options.tries)), flush=True)
    print(f"verdict: {'fits' if found.fits else 'does not fit'}")
    return 0


def advice(failed: Plan, tries: int) -> Iterator[str]:
    """Lines: changes tried by compiling them, until one fits."""
    from latent_jax.perf import planning

    yield "changes, compiled until one fits:"
    for number, (words, config, topology) in enumerate(planning.alternatives(failed)):
        if number == tries:
            yield f"  (stopped after {tries}; --tries=N for more)"
            return
        try:
            tried = planning.plan(config, topology)
        except UserError as problem:
            yield f"  {words}: {problem}"
            continue
        need = "unknown" if tried.peak is None else gib(tried.peak)
        yield f"  {words}: {'FITS' if tried.fits else 'does not fit'}, peak {need} of {gib(tried.memory)}"
        if tried.fits:
            return


# ---------------------------------------------------------------- words


def report(found: Plan) -> list[str]:
    """The whole report but the verdict."""
    lines = [*about(found), "", *memory(found)]
    if found.compiled:
        lines += ["", *costs(found, found.compiled), "", *moved(found.compiled), "", *estimate(found, found.compiled)]
    return lines


def about(found: Plan) -> list[str]:
    batch_shape, config = found.batches.batch_shape, found.config
    mesh = " x ".join(f"{axis} {size}" for axis, size in found.mesh.items())
    remat = found.remat + " (auto)" * (config.model.remat == "auto")
    return [
        f"{config.method}, {config.model.preset or config.model.path or 'the embedded model'}, on "
        f"{found.topology.name}: {found.topology.devices} x {found.topology.chip.kind}; mesh {mesh}; remat {remat}",
        f"compiled by {topologies.compiler(found.topology)}; attention: {found.attention}",
        f"batch: {batch_shape.micro} micro-step(s) x {batch_shape.groups} groups of {batch_shape.rows} rows x "
        f"{batch_shape.tokens} tokens, {batch_shape.patches} patches, {batch_shape.examples} examples "
        f"of {batch_shape.slots} slots",
        f"  (no data is read: {found.batches.example}; config.data.rows, .tokens, .patches name other sizes)",
    ]


def memory(found: Plan) -> list[str]:
    """Bytes of one device."""
    lines = [f"memory of one device: {gib(found.memory)}{share(found.topology)}"]
    lines += [f"  {name:<12} {gib(size):>11}" for name, size in found.arguments.items()]
    if found.temporaries is not None:
        lines += [f"  {'temporaries':<12} {gib(found.temporaries):>11}  (activations, gradients, gathered weights)"]
    lines += [f"  {'peak':<12} {'unknown' if found.peak is None else gib(found.peak):>11}"]
    if found.refused:
        lines += [f"the compiler refuses it: {found.refused}"]
    return lines


def share(topology: topologies.Topology) -> str:
    if not topology.gpu:
        return ""
    return f", {topologies.GPU_POOL:.0%} of {gib(topology.chip.memory)} (the rest is CUDA's, NCCL's and the libraries')"


def costs(found: Plan, compiled: Compiled) -> list[str]:
    text, vision = found.model_flops
    masked = "masked attention too" if found.attention.implementation == "reference" else "attention kernels not"
    devices = found.topology.devices
    return [
        f"FLOPs of one device and step: {compiled.flops:.3e} in the compiled matmuls (recomputation and padding "
        f"counted, {masked})",
        f"  the model's own: {text / devices:.3e} language + {vision / devices:.3e} vision "
        "(models/qwen2_5_vl/flops.py)",
        f"memory traffic of one device and step: {compiled.traffic:.3e} bytes",
    ]


def moved(compiled: Compiled) -> list[str]:
    """Collectives by kind."""
    lines = [
        f"collectives:          {'a step':>7} {'in loops':>9} {'bytes (whole arrays)':>21} {'largest in a loop':>18}"
    ]
    kinds = sorted({each.kind for each in compiled.collectives})
    for kind in kinds:
        own = [each for each in compiled.collectives if each.kind == kind]
        looped = [each for each in own if each.loops]
        lines.append(
            f"  {kind:<19} {sum(each.times for each in own):>7.0f} {sum(each.times for each in looped):>9.0f} "
            f"{gib(sum(each.bytes * each.times for each in own)):>21} "
            f"{gib(max((each.bytes for each in looped), default=0)):>18}"
        )
    return lines if kinds else ["collectives: none"]


def estimate(found: Plan, compiled: Compiled) -> list[str]:
    from latent_jax.perf.roofline import ASSUMPTIONS, peak

    bounds, text = compiled.roofline, found.model_flops[0]
    mfu = [text / (seconds * found.topology.devices * peak(found.topology.chip))
           for seconds in (bounds.hidden, bounds.exposed)]  # fmt: skip
    rates = [found.batches.work.tokens / seconds for seconds in (bounds.hidden, bounds.exposed)]
    network = f", network {bounds.network:.3f} s" if bounds.network else ""
    return [
        f"step time: {bounds.hidden:.3f} s if all collectives hide, {bounds.exposed:.3f} s if none does",
        f"  MFU of the language model {mfu[0]:.1%} to {mfu[1]:.1%}; {rates[0]:,.0f} to {rates[1]:,.0f} tokens/s",
        f"  matmuls {bounds.matmuls:.3f} s, memory {bounds.memory:.3f} s, links {bounds.links:.3f} s{network}",
        f"  bounds, not forecasts: {ASSUMPTIONS}",
    ]


def gib(size: float) -> str:
    """Bytes in words."""
    if size and size < 2**20 * 10:
        return f"{size / 2**20:.3f} MiB"
    return f"{math.ceil(size / 2**30 * 100) / 100:.2f} GiB"


if __name__ == "__main__":
    sys.exit(main())
