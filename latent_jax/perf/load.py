"""Checkpoints: an HF directory to arrays and back, gigabytes a second and memory above the weights."""

import argparse
import contextlib
import gc
import shutil
import tempfile
import threading
import time
from pathlib import Path

import jax

from latent_jax.models import hf_export, hf_io
from latent_jax.models.qwen2_5_vl.config import from_json
from latent_jax.perf import models, theirs, timing
from latent_jax.perf.timing import Report

WIDTH, LAYERS = 1024, 8  # of the random checkpoint that is taken without --model


class Peak:
    """Watches this process's anonymous memory (mapped files, which the kernel may drop, are none). 0 off Linux."""

    def __init__(self) -> None:
        self.bytes, self._going = 0, True
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Peak":
        gc.collect()
        self._start = self.bytes = anonymous()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._going = False
        self._thread.join()

    def above(self, kept: int) -> int:
        return self.bytes - self._start - kept

    def _watch(self) -> None:
        while self._going:
            self.bytes = max(self.bytes, anonymous())
            time.sleep(0.002)


def anonymous() -> int:
    with contextlib.suppress(OSError), open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("RssAnon"))
        return int(line.split()[1]) * 1024
    return 0


def measure(options: argparse.Namespace) -> Report:
    """Files lie in the page cache after the first round: this is the cost of the code, not of the disk."""
    width = options.width or (0 if options.model else WIDTH)
    with (
        models.checkpoint(options.model, width, options.layers or LAYERS) as directory,
        tempfile.TemporaryDirectory(prefix="latent_jax_bench_") as scratch,
    ):
        return _measure(options, Path(directory), Path(scratch))


def _measure(options: argparse.Namespace, directory: Path, scratch: Path) -> Report:
    config = from_json(directory / "config.json")
    load = lambda: jax.block_until_ready(hf_io.load(directory, config))
    with Peak() as peak:
        arrays = load()
    size = sum(array.nbytes for array in arrays.values())
    overhead = {"load": peak.above(size)}
    export = lambda: hf_export.save(scratch / "ours", arrays, config, source=directory)
    with Peak() as peak:
        export()
    overhead["export"] = peak.above(0)
    sides = {"load": {"ours": load}, "export": {"ours": export}}
    if options.against == "torch":
        import transformers

        theirs.quiet()
        kind = transformers.Qwen2_5_VLForConditionalGeneration
        # A value of every page is read: what from_pretrained gives may still lie in mapped files.
        read = lambda: [p.view(-1)[::1024].sum() for p in kind.from_pretrained(directory, dtype="auto").parameters()]
        model = kind.from_pretrained(directory, dtype="auto")
        sides["load"]["transformers"] = read
        sides["export"]["transformers"] = lambda: model.save_pretrained(scratch / "theirs")
    lines, numbers = [], {"bytes": size, "overhead_bytes": overhead}
    for what, pair in sides.items():
        more, numbers[what] = timing.compared("GB", size / 1e9, timing.alternate(pair, options.repeats))
        lines += [f"{what}:", *more, f"our memory above the weights: {overhead[what] / 2**20:.0f} MiB"]
    shutil.rmtree(scratch / "ours")
    return Report(f"load: {size / 1e9:.2f} GB of {next(iter(arrays.values())).dtype} weights", lines, numbers)
