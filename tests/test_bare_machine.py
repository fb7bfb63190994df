"""The training step runs on a machine that has jax, flax, optax, numpy, safetensors and jaxtyping, and nothing else."""

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
NAMED = ("jax", "jaxlib", "flax", "optax", "numpy", "safetensors", "jaxtyping")

# What a bare machine runs: argv[1] is the list of modules that it lacks, argv[2] the method.
CODE = """
import importlib, importlib.abc, json, sys, types

absent, method_name = set(json.loads(sys.argv[1])), sys.argv[2]

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {name!r} on a bare machine", name=name)

sys.meta_path.insert(0, Absent())
for missing in ("grain", "transformers", "torch", "PIL", "tensorflow_datasets", "clu", "ml_collections"):
    try:
        importlib.import_module(missing)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{missing} is there")

import jax, jax.numpy as jnp, numpy as np
from latent_jax.training import optimizer, state
from latent_jax.models.qwen2_5_vl.config import from_json
from latent_jax.runtime import sharding
from latent_jax.training.step import make_step

method = importlib.import_module(f"latent_jax.methods.{method_name}").METHOD
sections = {name: kind() for name, kind in method.sections.items()}
if "latent" in sections:
    import dataclasses
    sections["latent"] = dataclasses.replace(sections["latent"], grid=2)
Section = types.SimpleNamespace
config = Section(
    seed=0,
    method=method_name,
    model=Section(
        init="random",
        path="",
        trainable="language",
        compute_dtype="float32",
        remat="none",
        unroll=1,
        lora_rank=0,
        attention="auto",
    ),
    data=Section(image_patches=16, replay=0.0),
    train=Section(
        steps=4, warmup=0.0, schedule="constant", learning_rate=1e-2, head_learning_rate=0.0, end_factor=1.0,
        weight_decay=0.0, clip=1.0, beta1=0.9, beta2=0.95, epsilon=1e-8, accumulate=1,
    ),
    **sections,
)
model_config = from_json("latent_jax/models/presets/tiny.json")
mesh = sharding.make_mesh(1, 1, 1, jax.devices()[:1])
setup = state.make_setup(config, method, model_config, mesh, {})
first = state.first_state(setup, "")

# One group of one row: an image of 4 x 4 patches, six words; S slots that predict the image where the method has them.
T, P, S = 24, 16, method.room(config).slots
index = np.full(T, -1, np.int32)
merged = P // 4
index[1 : 1 + merged] = np.arange(merged)
words = np.arange(6, 12)
index[13 : 13 + S] = merged + np.arange(S)
used = 13 + S
rows, columns = np.divmod(np.arange(P), 4)
order = np.lexsort((columns, rows, columns // 2, rows // 2))
loss_weights = np.zeros(T, np.float32)
loss_weights[words] = 1
full = lambda *shape: np.zeros(shape, np.int32)
batch = {
    "tokens": np.arange(T, dtype=np.int32) % 7 + 65,
    "segment_ids": (np.arange(T) < used).astype(np.int32),
    "view_ids": full(T),
    "targets": np.arange(1, T + 1, dtype=np.int32) % 7 + 65,
    "feature_index": index,
    "positions": np.broadcast_to(np.arange(T, dtype=np.int32), (3, T)),
    "loss_weights": loss_weights,
}
batch = {name: value[None] for name, value in batch.items()}
batch |= {
    "patches": np.random.default_rng(0).integers(0, 256, (P, 588), np.uint8),
    "patch_positions": np.stack([rows[order], columns[order]], 1).astype(np.int32),
    "patch_window": np.ones(P, np.int32),
    "patch_image": np.ones(P, np.int32),
    "example_mask": np.array([True]),
    "number": full(1),
}
if S:
    batch |= {
        "slot_index": np.arange(13, 13 + S, dtype=np.int32)[None],
        "slot_mask": np.ones((1, S), bool),
        "target_image": np.ones((1, 1), np.int32),
        "target_grid": np.array([[[2, 2]]], np.int32),
        "target_mask": np.ones((1, 1), bool),
    }
batch = {name: np.ascontiguousarray(value)[None, None] for name, value in batch.items()}
step, current, losses = make_step(setup), first, []
for _ in range(4):
    current, found = step(current, batch)
    losses.append({name: float(value) for name, value in found.items() if name.startswith("loss/")})
print(json.dumps(losses))
"""


def closure(names) -> set[str]:
    """The distributions that installing these brings along."""
    found, left = set(), [Requirement(name) for name in names]
    seen = set()
    while left:
        requirement = left.pop()
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if key in seen:
            continue
        seen.add(key)
        try:
            needs = importlib.metadata.requires(requirement.name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found.add(key[0])
        for need in map(Requirement, needs):
            if need.marker is None or any(need.marker.evaluate({"extra": e}) for e in ("", *requirement.extras)):
                left.append(need)
    return found


def absent() -> list[str]:
    """The top-level modules of this environment that a bare machine lacks."""
    there = closure(NAMED) | {"latent-jax"}
    by_module = importlib.metadata.packages_distributions()
    return sorted(m for m, owners in by_module.items() if not {canonicalize_name(o) for o in owners} & there)


@pytest.mark.parametrize("method", ["pretrain", "sft"])
def test_a_step_runs_with_the_six_packages_alone(method):
    lacks = absent()
    assert {"grain", "transformers", "torch", "PIL", "tensorflow_datasets", "clu", "ml_collections"} <= set(lacks)
    assert not {"jax", "flax", "optax", "numpy", "safetensors", "jaxtyping"} & set(lacks)
    ended = subprocess.run(
        [sys.executable, "-c", CODE, json.dumps(lacks), method], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert ended.returncode == 0, ended.stderr
    losses = json.loads(ended.stdout.splitlines()[-1])
    terms = {"loss/next_token", "loss/similarity", "loss/alignment"} if method == "pretrain" else {"loss/next_token"}
    assert terms | {"loss/total"} == losses[0].keys()
    assert all(0 < losses[-1][term] < losses[0][term] for term in terms - {"loss/alignment"}), losses
