"""What is injured, the command that then reads it, and the numbers that must come out equal.

A subject's folder is built once; a trial works on a copy. Every path in a command is relative to that copy, so that a
config that holds paths is the same in all of them.
"""

import dataclasses
import hashlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from latent_jax.data.builders.build import BUILDERS
from tests.faults import forms, warm
from tests.reference import untimed

# What differs between two right runs: times, and the state of the checkout.
TIMED = {*untimed.TIMED, "seconds", "throughput", "git_commit"}
CONFIGS = warm.REPOSITORY / "configs"
TRAIN = [
    f"--config={CONFIGS / 'pretrain.py'}", "--workdir=run", "--config.data.path=data", "--config.mesh.cpu_devices=1",
    "--config.model.unroll=1", "--config.data.sample=8", "--config.latent.statistics_examples=4",
    "--config.evaluate.examples=2", "--config.train.batch_size=4", "--config.checkpoint.every=2",
    "--config.data.max_bad=0.5",
]  # fmt: skip
EVALUATE = [
    f"--config={CONFIGS / 'evaluate.py'}", "--workdir=run", "--config.benchmark=gqa", "--config.data.path=data",
    "--config.data.split=validation", "--config.evaluate.batch_size=4", "--config.evaluate.examples=16",
    "--config.evaluate.max_new_tokens=4",
]  # fmt: skip
STEPS = 6


@dataclasses.dataclass(frozen=True)
class Subject:
    """build: (base, place) writes what the command finds; command: (module, arguments); injured: the folder of `place`
    in which one file is injured; results: place -> JSON-able numbers; records: results are {split: {key: digest}}."""

    build: Callable[[Path, Path], None]
    command: tuple[str, list[str]]
    injured: str
    results: Callable[[Path], Any]
    records: bool = False


def subjects() -> dict[str, Subject]:
    train = ("main", [*TRAIN, f"--config.train.steps={STEPS}"])
    cached = ("main", [*train[1], "--config.data.latent_cache=cache"])
    fresh = ("main", [*TRAIN, "--config.train.steps=4"])
    found = {
        "resume": Subject(half, train, "run", trained),
        "resume_cached": Subject(half_cached, cached, "run", trained),
        "cache": Subject(cache_alone, cached, "cache", trained),
        "finished": Subject(finished, train, "run", trained),
        "evaluation": Subject(half_evaluated, ("main", [*EVALUATE, "--config.model.path=hf"]), "run", evaluated),
        "evaluated_model": Subject(model_and_data, ("main", [*EVALUATE, "--config.model.path=hf"]), "hf", evaluated),
        "model": Subject(model, ("generate", ["--model=hf", "--prompt=What?", "--max_new_tokens=8"]), "hf", answered),
        "convert": Subject(model, ("convert", ["--checkpoint=hf", "--output=out"]), "hf", converted),
        "convert_run": Subject(workdir, ("convert", ["--checkpoint=run", "--output=out"]), "run", converted),
        "prepared": Subject(prepared, fresh, "data/coco_captions", trained),
        "started": Subject(model_and_data, ("main", [*fresh[1], "--config.model.path=hf"]), "hf", trained),
    }
    for name in BUILDERS:
        arguments = [f"--dataset={name}", "--raw=raw", "--output=out", "--max_bad=0.5", "--workers=1"]
        form = Subject(raw(name), ("prepare", arguments), "raw", lambda place: read_records(place / "out"), True)
        found[f"raw_{name}"] = form
    return found


# ---------------------------------------------------------------- what the commands find


def make_data(base: Path) -> int:
    """The embedded world, few records, prepared; shared by the subjects that do not injure it."""
    from latent_jax.data.builders.build import build_scenes

    build_scenes(base / "data", sizes={"train": 24, "validation": 4})
    return 0


def link_data(base: Path, place: Path) -> None:
    (place / "data").symlink_to(base / "data")


def finished(base: Path, place: Path) -> None:
    """A whole run."""
    link_data(base, place)
    succeed(place, "main", [*TRAIN, f"--config.train.steps={STEPS}"])


def half(base: Path, place: Path) -> None:
    """A run whose last checkpoint and what follows it are not there yet."""
    finished(base, place)
    take_back(place)


def half_cached(base: Path, place: Path) -> None:
    cache_alone(base, place)
    succeed(place, "main", [*TRAIN, f"--config.train.steps={STEPS}", "--config.data.latent_cache=cache"])
    take_back(place)


def take_back(place: Path) -> None:
    shutil.rmtree(place / "run" / "checkpoints" / str(STEPS))
    unfinish(place)
    shutil.rmtree(place / "run" / "hf")


def unfinish(place: Path) -> None:
    """Takes away what a run writes after its last step and its export."""
    for name in ("finished.json", "imagination.json", "curves.png", "neighbours.png"):
        (place / "run" / name).unlink(missing_ok=True)


def cache_alone(base: Path, place: Path) -> None:
    """A filled latent cache, no run."""
    link_data(base, place)
    succeed(place, "main", [*TRAIN, "--config.train.steps=1", "--config.data.latent_cache=cache"])
    shutil.rmtree(place / "run")


def workdir(base: Path, place: Path) -> None:
    finished(base, place)
    shutil.rmtree(place / "run" / "hf")


def model(base: Path, place: Path) -> None:
    """An export with its latent head."""
    finished(base, place)
    (place / "run" / "hf").rename(place / "hf")
    shutil.rmtree(place / "run")


def model_and_data(base: Path, place: Path) -> None:
    model(base, place)


def half_evaluated(base: Path, place: Path) -> None:
    model(base, place)
    succeed(place, "main", [*EVALUATE, "--config.model.path=hf"])
    file = place / "run" / "predictions.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[: len(lines) // 2]))
    (place / "run" / "results.json").unlink()


def prepared(base: Path, place: Path) -> None:
    shutil.copytree(base / "data", place / "data", ignore=shutil.ignore_patterns("raw"))


def raw(name: str) -> Callable[[Path, Path], None]:
    return lambda base, place: forms.write(name, place / "raw")


def succeed(place: Path, module: str, arguments: list[str]) -> None:
    said = warm.run(module, arguments, place, 300)
    if said.status != 0:
        raise RuntimeError(f"{module} {' '.join(arguments)} in {place}: status {said.status}\n{said.err[-2000:]}")


# ---------------------------------------------------------------- what comes out


def trained(place: Path) -> dict:
    return {
        "metrics": untimed.metrics(place / "run"),
        "hf": tensors(place / "run" / "hf"),
        **_report(place / "run" / "imagination.json"),
    }


def _report(file: Path) -> dict:
    return {"report": json.loads(file.read_text())} if file.exists() else {}


def evaluated(place: Path) -> dict:
    run = place / "run"
    predictions = [_untimed(json.loads(line)) for line in (run / "predictions.jsonl").read_text().splitlines()]
    return {"predictions": predictions, "results": _untimed(json.loads((run / "results.json").read_text()))}


def answered(place: Path) -> str:
    return (place.parent / "said.out").read_text(errors="replace")


def converted(place: Path) -> dict:
    """Without the card: a run whose finished.json is gone is one without a report, as its card is."""
    return {name: digest for name, digest in tensors(place / "out").items() if name != "README.md"}


def tensors(folder: Path) -> dict[str, str]:
    """Every tensor's and every small file's digest."""
    from safetensors.numpy import load_file

    found = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        if file.suffix == ".safetensors":
            found |= {f"{file.name}/{name}": _digest(_array_bytes(a)) for name, a in load_file(file).items()}
        else:
            found[str(file.relative_to(folder))] = file_digest(file)
    return found


def file_digest(file: Path) -> str:
    """Without reading it whole: an injured one may be huge."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()[:16]


def _array_bytes(array) -> bytes:
    return f"{array.dtype}{array.shape}".encode() + array.tobytes()


def read_records(folder: Path) -> dict[str, dict[str, str]]:
    """Split -> key -> digest of the record, and under "" how many the tool says it skipped. Every image must decode."""
    import tensorflow_datasets as tfds
    from PIL import Image

    from latent_jax.data import sources

    (made,) = folder.glob("*/*/dataset_info.json")
    name, found = made.parent.parent.name, {}
    for split in tfds.builder_from_directory(made.parent).info.splits:
        found[split] = {}
        for record in sources.open_source(name, folder, split):
            for image in (*record["images"], *record.get("helper_images", ())):
                Image.open(io.BytesIO(image)).load()
            found[split][record["key"]] = _digest(repr(record).encode())
    listed = made.parent / "skipped.jsonl"
    found[""] = {"skipped": len(listed.read_text().splitlines()) if listed.exists() else 0}
    return found


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _untimed(node):
    if isinstance(node, dict):
        return {name: _untimed(child) for name, child in node.items() if name not in TIMED}
    return [_untimed(child) for child in node] if isinstance(node, list) else node
