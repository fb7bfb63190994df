"""What a training run leaves behind, read back: its config, its model and its latest weights."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from latent_jax import methods
from latent_jax.config import schema
from latent_jax.config.training import Config
from latent_jax.errors import UserError
from latent_jax.models import lora
from latent_jax.models.card import Card
from latent_jax.models.heads import LatentVLM
from latent_jax.models.origin import check_origin, kept_license
from latent_jax.models.parameters import Structure
from latent_jax.models.qwen2_5_vl.config import ModelConfig, from_json
from latent_jax.runtime import files, provenance
from latent_jax.runtime.checkpoints import Checkpoints
from latent_jax.training.state import new_model

CHECKPOINTS, ORIGIN, CONFIG, PARAMETERS = "checkpoints", "hf_files", "config.json", "parameters.txt"
FINISHED = "finished.json"  # once there is nothing left to do: at which step, and what the report found


@dataclasses.dataclass(frozen=True)
class Run:
    """A workdir's config, model structure and the files of the checkpoint it began with."""

    directory: Path
    config: Config
    measured: dict
    model_config: ModelConfig
    structure: Structure[LatentVLM]

    @classmethod
    def of(cls, directory: str | Path) -> "Run":
        """Raises UserError where the directory is not a workdir."""
        directory = Path(directory)
        config, measured = schema.read_run(directory / CONFIG)
        method = methods.find(config.method)
        check_origin(directory / ORIGIN)
        model_config = from_json(directory / ORIGIN / "config.json")
        structure = Structure.of(nnx.eval_shape(lambda: new_model(config, method, model_config)))
        return cls(directory, config, measured, model_config, structure)

    @property
    def origin(self) -> Path:
        """Small files (config, tokenizer, processor) of the checkpoint that the run started from."""
        return self.directory / ORIGIN

    def arrays(self, step: int | None = None) -> dict[str, np.ndarray | lora.Merged]:
        """The weights of a step, or of the newest, by dotted path, without the optimiser's state.

        Adapters are merged into the weights that they adapt: what comes back is the model without any.
        """
        run = self.measured.get("run")
        with Checkpoints(self.directory / CHECKPOINTS, read_only=True, run=run) as checkpoints:
            found = dict(checkpoints.restore_item(step, "trainable"))
            if any(path not in found for path in self.structure.variables):
                found |= checkpoints.restore_item(step, "frozen")
        if missing := self.structure.variables.keys() - found.keys():
            raise UserError(f"{self.directory}: the checkpoint lacks {sorted(missing)[0]}, which its config asks for")
        return lora.merge(found, self.config.model.lora_rank, self.config.model.lora_alpha)

    def newest(self) -> int:
        """The newest checkpoint's step."""
        with Checkpoints(self.directory / CHECKPOINTS, read_only=True) as checkpoints:
            return checkpoints.latest() or 0


def steps(directory: str | Path) -> list[int]:
    """Of a workdir's checkpoints, oldest first: by their names, without opening any."""
    return sorted(int(path.name) for path in (Path(directory) / CHECKPOINTS).glob("*") if path.name.isdecimal())


def named_step(path: str | Path) -> tuple[Path, int | None]:
    """(workdir, step) of a path WORKDIR/checkpoints/STEP; (the path, None) of any other."""
    resolved = Path(os.path.realpath(path))
    if resolved.parent.name == CHECKPOINTS and resolved.name.isascii() and resolved.name.isdigit():
        return resolved.parent.parent, int(resolved.name)
    return Path(path), None


def read_finished(directory: Path) -> dict:
    """The note that the run in `directory` left at its end: {"step", "settings", "report", "command"}; {} before that.

    Notes of earlier versions have no command. Raises UserError where it is damaged.
    """
    file = directory / FINISHED
    if not file.exists():
        return {}
    try:
        found = files.opened(files.read_json(file, expected="what a finished run found"))
        if not isinstance(found["step"], int) or not isinstance(found["report"], dict):
            raise ValueError("holds no step and report")
        return found
    except (ValueError, KeyError) as problem:
        raise UserError(
            f"{file}: damaged: {problem}; expected what the finished run found: run its command again, or remove it"
        ) from None


def numbers(report: dict) -> dict[str, float]:
    """Of a report, what a card has a row for."""
    return {name: value for name, value in report.items() if isinstance(value, int | float)}


def card(config: Config, steps: int, numbers: dict[str, float], command: str, origin: Path) -> Card:
    """The README.md of an export; `origin`: the files of the base model that the workdir keeps."""
    return Card(
        base_model=config.model.path or "tiny_vl" if config.model.init == "checkpoint" else "random weights",
        method=config.method,
        data=f"{config.data.name} ({config.data.split})",
        steps=steps,
        command=command,
        numbers=numbers,
        versions=provenance.versions(),
        license=kept_license(origin) if config.model.init == "checkpoint" else {},
    )


def is_workdir(directory: str | Path) -> bool:
    return (Path(directory) / CHECKPOINTS).is_dir()


def split(arrays: Mapping[str, np.ndarray | jax.Array | lora.Merged]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(vlm arrays, head arrays), each under its own paths."""
    vlm = {p.removeprefix("vlm."): a for p, a in arrays.items() if p.startswith("vlm.")}
    head = {p.removeprefix("head."): a for p, a in arrays.items() if p.startswith("head.")}
    return vlm, head


def place(arrays: dict[str, np.ndarray | lora.Merged], dtype: DTypeLike | None) -> dict[str, jax.Array]:
    """Arrays on the default device, in `dtype` where it is given."""
    return {path: jnp.asarray(np.asarray(array), dtype) for path, array in arrays.items()}
