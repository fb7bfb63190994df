"""What follows the last step: the HF export, the report on held-out data, and the note that all of it is done."""

import dataclasses
import importlib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import jax

from latent_jax.config.training import Config
from latent_jax.data.chat import Processor
from latent_jax.errors import UserError, one_line
from latent_jax.methods.contract import Method
from latent_jax.models import hf_export, lora, sums
from latent_jax.models.heads import LatentVLM
from latent_jax.runtime import files, hosts, metrics, preemption
from latent_jax.runtime.checkpoints import Checkpoints
from latent_jax.runtime.metrics import Metrics
from latent_jax.runtime.progress import Progress
from latent_jax.training import latent_config, validation, workdir
from latent_jax.training.state import Setup, TrainState
from latent_jax.training.workdir import FINISHED


def finish(
    setup: Setup, state: TrainState, processor: Processor, directory: Path, progress: Progress, asked: preemption.Asked
) -> dict[str, float]:
    """The HF export, what the method's report finds on held-out data, and the note that all of it is done."""
    if setup.config.checkpoint.export:
        asked.at_once("the export")
        for note in export(setup, state, directory):
            progress.say(note)
        progress.say(f"HF checkpoint: {directory / 'hf'}")
    found, report = {}, {}
    if setup.config.evaluate.every and hosts.primary():
        found = validation.best(metrics.read(directory / "metrics.jsonl"))
    if found:
        step, loss = found.values()
        progress.say(f"validation loss lowest at step {step}: {loss:.4g}; the export is of step {int(state.step)}")
    if setup.method.report:
        asked.at_once("the report on held-out data")
        reporter = importlib.import_module(setup.method.report)
        if (model := local_model(setup, state)) is not None:
            report = reporter.run(model, setup.config, processor, directory, progress.say)
            if report and setup.config.checkpoint.export:
                hf_export.write_card(directory / "hf", card_text(setup, int(state.step), report, directory))
    report = report | found
    if hosts.primary():
        done = {"step": int(state.step), "settings": _last_settings(setup.config), "report": report}
        done |= {"command": _command()}
        files.write_text(directory / FINISHED, files.as_json(files.sealed(done)))
    return report


def finished(checkpoints: Checkpoints, config: Config, directory: Path) -> dict[str, float] | None:
    """What the report found, where all steps, the export and the report are done already; else None.

    Raises UserError where the metrics are not those that were written.
    """
    latest = checkpoints.latest() or 0
    done: dict = {}
    expected = None
    try:
        done = workdir.read_finished(directory)
        same = done["step"] == latest == config.train.steps and done["settings"] == _last_settings(config)
        expected = checkpoints.extra(latest).get("metrics") if same else None
    except (UserError, KeyError):  # not there, or damaged: then it is done again
        same = False
    hf = directory / "hf"
    # Exports of earlier versions have no checksums.
    there = sums.complete(hf) if sums.place(hf).exists() else (hf / "config.json").exists()
    whole = there or not config.checkpoint.export
    # A host may see late what another wrote to a shared disk, and all must go the same way.
    if hosts.summed({"finished": float(same and whole)})()["finished"] < jax.process_count():
        return None
    if hosts.primary():
        Metrics(directory, latest, tensorboard=False, expected=expected).close()
    return done.get("report", {})


def _last_settings(config: Config) -> dict:
    """The settings that what follows the last step depends on, beside those that a resumed run cannot change."""
    asked = dataclasses.asdict(config.evaluate)
    del asked["every"]  # while training
    return {"export": config.checkpoint.export, **asked}


def local_model(setup: Setup, state: TrainState) -> LatentVLM | None:
    """The model on the first host's devices alone, gathered weight by weight; None on the others."""
    if jax.process_count() > 1:
        setup = dataclasses.replace(setup, mesh=hosts.local_mesh()) if hosts.primary() else setup
        placed = []
        for arrays in (state.trainable, state.frozen):
            gathered = ((path, hf_export.gather(array)) for path, array in arrays.items())
            placed.append({p: jax.device_put(a, setup.sharding(p)) for p, a in gathered if hosts.primary()})
        if not hosts.primary():
            return None
        state = state._replace(trainable=placed[0], frozen=placed[1])
    return setup.build(state.trainable, state.frozen)


def export(setup: Setup, state: TrainState, directory: Path) -> list[str]:
    """Writes WORKDIR/hf: a plain HF checkpoint, and the latent head beside it. Returns lines worth saying."""
    model = setup.config.model
    arrays = lora.merge({**state.trainable, **state.frozen}, model.lora_rank, model.lora_alpha)
    vlm, head = workdir.split(arrays)
    head = latent_config.head(setup.method, head)  # gathered on every host: all take part in that
    return hf_export.save(
        directory / "hf",
        vlm,
        setup.model_config,
        source=directory / workdir.ORIGIN,
        latent=latent_config.beside(setup.config, {p: hf_export.gather(a) for p, a in head.items()}),
        card=card_text(setup, int(state.step), {}, directory),
    )


def card_text(setup: Setup, step: int, report: dict, directory: Path) -> str:
    """The export's README.md: what it was made from and by which command, and what the report found."""
    head = any(path.startswith("head.") for path in setup.structure.variables)
    found = workdir.numbers(report)
    return workdir.card(setup.config, step, found, _command(), directory / workdir.ORIGIN).text(head)


def _command() -> str:
    """By which this process trains, "" where it was not started by one."""
    as_command = Path(sys.argv[0]).name == "main.py"
    return shlex.join(["python", "-m", "latent_jax.main", *sys.argv[1:]]) if as_command else ""


def _check_files(directory: Path, names: Sequence[str]) -> None:
    """Raises UserError where the end of the run could not write one of its files: a folder has its name."""
    if taken := [name for name in names if (directory / name).is_dir()]:
        raise UserError(
            f"{directory / taken[0]}: a directory; expected a file of an earlier run, or nothing: move it away"
        )


def _reporter(config: Config, method: Method) -> ModuleType | None:
    """The module of the method's report, None where it has none. Raises UserError where there is no such module."""
    if not method.report:
        return None
    try:
        return importlib.import_module(method.report)
    except ImportError as problem:
        raise UserError(f"config.method: Method.report of {config.method}: {one_line(problem)}") from problem


def look_ahead(config: Config, method: Method, directory: Path) -> list[str]:
    """Checks what only the end of the run needs. Returns lines on what will be left out.

    Raises UserError where the export, or a file of the report, could not be written.
    """
    if config.checkpoint.export and hosts.primary():
        hf_export.check_replaceable(directory / "hf")
    reporter = _reporter(config, method)
    _check_files(directory, (FINISHED, *(reporter.FILES if reporter else ())))
    if reporter is None:
        return []
    missing = reporter.lacking(config)
    return [f"no report on held-out data: {missing}"] if missing else []
