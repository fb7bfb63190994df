"""The input pipeline: encoded JPEG to patches, ours against the image processor of transformers."""

import argparse
import io
import itertools
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import PIL.Image

from latent_jax.data import images
from latent_jax.data.image_spec import ImageSpec
from latent_jax.perf import theirs, timing
from latent_jax.perf.timing import Report

SIZE = (1024, 768)
FILES = 8


def measure(options: argparse.Namespace) -> Report:
    """Images a second of one thread, which is one core's worth, and of one thread a core.

    Both sides have the published preprocessor's defaults: a picture of this size keeps it, but for rounding to 28
    pixels. Ours leaves normalisation and the repeated frame to the device.
    """
    files = [jpeg(seed) for seed in range(FILES)]
    ours, cores = partial(_ours, spec=ImageSpec()), timing.cores()
    sides = {"ours": lambda: [ours(file) for file in files]}
    if options.against == "torch":
        processor = theirs.image_processor()
        sides["transformers"] = lambda: [_theirs(file, processor) for file in files]
    times = timing.alternate(sides, options.repeats)
    with ThreadPoolExecutor(cores) as pool:
        many = [*itertools.islice(itertools.cycle(files), FILES * cores)]
        threads = timing.alternate({f"ours, {cores} threads": lambda: list(pool.map(ours, many))}, options.repeats)
    lines, numbers = timing.compared("images", FILES, times)
    more, rest = timing.compared("images", len(many), threads, f"ours, {cores} threads")
    for name in times:
        numbers[name]["images_per_processor_second"] = FILES / numbers[name]["processor_median_seconds"]
        lines.append(f"{name}: {numbers[name]['images_per_processor_second']:.1f} images a second of one core")
    shape = ours(files[0]).patches.shape
    numbers |= rest | {"size": SIZE, "jpeg_bytes": [len(file) for file in files], "patches": shape}
    return Report(f"data: JPEG of {SIZE[0]}x{SIZE[1]} to {shape[0]} patches, one thread", lines + more, numbers)


def jpeg(seed: int) -> bytes:
    """A picture with large shapes and fine grain, about as large a file as a photograph of its size."""
    rng = np.random.default_rng(seed)
    coarse = PIL.Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize(SIZE, PIL.Image.Resampling.BICUBIC)
    grain = rng.normal(0, 6, (SIZE[1], SIZE[0], 3))
    buffer = io.BytesIO()
    PIL.Image.fromarray(np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8)).save(buffer, "jpeg", quality=85)
    return buffer.getvalue()


def _ours(file: bytes, spec: ImageSpec) -> images.Patches:
    return images.patchify(images.open_image(file), spec)


def _theirs(file: bytes, processor: Any) -> Any:
    from transformers.image_utils import load_image

    return processor(images=[load_image(images.opened(io.BytesIO(file)))], return_tensors="np")
