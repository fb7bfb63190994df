"""Loading and exporting a 3B-shaped checkpoint takes hardly more memory than its arrays."""

import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from latent_jax.models import tensor_files
from latent_jax.models.qwen2_5_vl import hf_names
from latent_jax.models.qwen2_5_vl.config import from_json

PRESET = Path(hf_names.__file__).parents[1] / "presets" / "qwen2_5_vl_3b.json"
LIMIT = 2 * 2**30

# A process of its own: RssAnon counts this process's memory less the pages of mapped files, which the kernel may drop.
MEASURE = """
import json, sys, threading, time
import jax
from latent_jax.models import hf_export, hf_io
from latent_jax.models.qwen2_5_vl.config import from_json

def anonymous():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024

def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.005)

source, output = sys.argv[1:]
config = from_json(source + "/config.json")
jax.block_until_ready(jax.numpy.zeros(1))  # the backend is not what is measured
before = peak = anonymous()
threading.Thread(target=watch, daemon=True).start()
start = time.time()
arrays = jax.block_until_ready(hf_io.load(source, config))
held = sum(array.nbytes for array in arrays.values())
figures = {"arrays": held, "load_seconds": time.time() - start, "load_overhead": peak - before - held}
peak, start = anonymous(), time.time()
hf_export.save(output, arrays, config, source=source)
figures |= {"export_seconds": time.time() - start, "export_overhead": peak - before - held}
print(json.dumps(figures))
"""


@pytest.fixture
def checkpoint(tmp_path):
    """Random bfloat16 weights of the published 3B shape in two shards (7.5 GB)."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_bytes(PRESET.read_bytes())
    config = from_json(PRESET)
    rng, bfloat16 = np.random.default_rng(0), np.dtype(ml_dtypes.bfloat16)
    # Any bits below 0x7f80 are finite numbers.
    make = lambda shape: rng.integers(0, 0x7F80, shape, np.uint16).view(bfloat16)
    shapes = list(hf_names.published_shapes(config).items())
    files = {"model-00001-of-00002.safetensors": shapes[:300], "model-00002-of-00002.safetensors": shapes[300:]}
    for file, part in files.items():
        entries = {n: tensor_files.Entry(bfloat16, s, lambda s=s: [make(s)]) for n, s in part}
        tensor_files.write(source / file, entries)
    weight_map = {name: file for file, part in files.items() for name, _ in part}
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    yield source
    for file in tmp_path.rglob("*.safetensors"):  # pytest would keep them for three runs
        file.unlink()


def tensors(directory):
    return {n: t for file in directory.glob("*.safetensors") for n, t in tensor_files.read(file).items()}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is Linux's")
def test_host_overhead_of_a_3b_checkpoint(checkpoint, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, checkpoint, tmp_path / "out"], check=True, capture_output=True, text=True
    )
    figures = json.loads(done.stdout.splitlines()[-1])
    print({name: f"{value / 2**30:.2f} GiB" if value > 1e6 else f"{value:.1f}" for name, value in figures.items()})
    assert figures["arrays"] > 7e9
    assert figures["load_overhead"] <= LIMIT
    assert figures["export_overhead"] <= LIMIT
    before, after = tensors(checkpoint), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name].view(np.uint16), after[name].view(np.uint16)) for name in before)
