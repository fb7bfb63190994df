"""What a workdir keeps of the checkpoint that its run starts from (WORKDIR/hf_files): what its exports are made of.

Small files as they were, but for what the run itself decides (a preset's shape, its pixel limits); the dtype and file
of every tensor; and a checksum of each of these, so that damage is noticed before a step is trained.
"""

import dataclasses
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from latent_jax.errors import UserError
from latent_jax.models import hf_io, sums
from latent_jax.models.card import LICENSE_KEYS, stated_license
from latent_jax.models.hf_io import INDEX_FILE, SINGLE_FILE, SMALL_FILES
from latent_jax.models.qwen2_5_vl.config import from_json
from latent_jax.models.staging import staged
from latent_jax.runtime.files import as_json, read_bytes, read_json, whole, write_text

# In a workdir: dtype and file of every tensor of the checkpoint that the run started from.
ORIGIN_FILE = "tensors.json"
PROCESSORS = ("preprocessor_config.json", "processor_config.json")  # of images: pixel limits and more


@dataclasses.dataclass(frozen=True)
class Origin:
    """What an export keeps of its source's weights: published name -> dtype, and whether they were one file."""

    dtypes: dict[str, np.dtype]
    single_file: bool

    @classmethod
    def of(cls, directory: str | Path) -> "Origin | None":
        """Read from a workdir's record, or from the weights themselves; None where the directory has neither."""
        directory = Path(directory)
        if (directory / ORIGIN_FILE).exists():
            record = read_json(directory / ORIGIN_FILE)
            try:
                dtypes = {name: jnp.dtype(dtype) for name, dtype in record["dtypes"].items()}
                return cls(dtypes, bool(record["single_file"]))
            except (KeyError, TypeError, AttributeError):
                raise UserError(f"{directory / ORIGIN_FILE}: expected dtypes by tensor, and single_file") from None
        if not (directory / SINGLE_FILE).exists() and not (directory / INDEX_FILE).exists():
            return None
        source = hf_io.Checkpoint.open(directory)
        dtypes = {name: tensor.dtype for name, tensor in source.tensors.items()}
        return cls(dtypes, len(set(source.files.values())) == 1)


def keep_origin(
    source: str | Path,
    destination: str | Path,
    *,
    shape: str | Path | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
) -> None:
    """Copies into a workdir what its exports need of the checkpoint it starts from: small files, dtypes, sharding.

    `shape` is a config.json that stands in for the source's. Pixel limits that the run sets take the place of those in
    the processor's file. With many processes the first one does.
    """
    if jax.process_index() != 0:
        return
    source, destination = hf_io.resolve(source), Path(os.path.realpath(destination))
    origin = Origin.of(source)
    with staged(destination) as partial:
        copy_files(source, partial, SMALL_FILES)
        if shape:
            write_text(partial / "config.json", Path(shape).read_text())
        limits = {"min_pixels": min_pixels, "max_pixels": max_pixels}
        set_limits(partial, {key: value for key, value in limits.items() if value})
        if origin:
            dtypes = {name: str(dtype) for name, dtype in origin.dtypes.items()}
            record = {"single_file": origin.single_file, "dtypes": dtypes, "license": stated_license(source)}
            write_json(partial / ORIGIN_FILE, record)
        sums.write(partial)


def kept_license(directory: str | Path) -> dict[str, str]:
    """What `keep_origin` found of the base model's license; {} where it states none, or an earlier version kept it."""
    file = Path(directory) / ORIGIN_FILE
    found = read_json(file).get("license") if file.exists() else None
    found = found if isinstance(found, dict) else {}
    return {key: found[key] for key in LICENSE_KEYS if isinstance(found.get(key), str)}


def check_origin(directory: str | Path) -> None:
    """Raises UserError naming the kept file that is missing or not as it was kept.

    A workdir of an earlier version has no checksums: there the JSON files must be whole.
    """
    directory = Path(directory)
    if not (directory / sums.FILE).exists():
        from_json(directory / "config.json")
        for file in sorted(directory.glob("*.json")):
            read_json(file)
        return
    sums.check(directory, "expected what the run began with; restore it from the run's model.path")


def copy_files(source: Path, destination: Path, names: Iterable[str]) -> None:
    """Copies those of the files that are there. What an export is made of must be whole: UserError naming the file that
    is a link to nothing, no regular file, or no JSON under such a name."""
    for name in names:
        if not os.path.lexists(source / name):
            continue
        content = read_bytes(source / name)
        if name.endswith(".json"):
            read_json(source / name, expected="a JSON object of a Hugging Face checkpoint")
        with whole(destination / name) as file:
            file.write(content)


def write_json(path: Path, value: Any) -> None:
    write_text(path, as_json(value))


def set_limits(directory: Path, limits: Mapping[str, int]) -> None:
    """Pixel limits under every key by which an image processor finds them: newer ones are called sizes of edges."""
    edges = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}
    for name in PROCESSORS:
        file = directory / name
        if not limits or not file.exists():
            continue
        content = read_json(file)
        nested = content.get("image_processor")
        settings = nested if isinstance(nested, dict) else content
        if name == "processor_config.json" and settings is content:
            continue
        settings.update(limits)
        if isinstance(settings.get("size"), dict):
            settings["size"].update({edges[key]: value for key, value in limits.items()})
        write_json(file, content)
