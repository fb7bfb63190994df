"""Runs a builder so that its output appears only when it is complete, and so that a killed run goes on."""

import contextlib
import fcntl
import importlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from latent_jax.errors import UserError
from latent_jax.runtime.files import write_text

# Dataset -> the class in the module of its name.
BUILDERS = {
    "coco_captions": "CocoCaptions",
    "conceptual_captions": "ConceptualCaptions",
    "laion": "Laion",
    "gqa": "Gqa",
    "scienceqa": "ScienceQa",
    "blink": "Blink",
    "vstar": "VStar",
    "mmvp": "Mmvp",
    "vsp": "Vsp",
}
MAX_BAD = 0.05
_DONE = "done.json"  # in the work folder, when nothing but the renaming is left


def build(
    name: str,
    raw: str | os.PathLike,
    output: str | os.PathLike,
    *,
    max_bad: float = MAX_BAD,
    workers: int | None = None,
) -> list[str]:
    """Turns dataset `name` in its official form at `raw` into `output`/NAME/VERSION/*.array_record*.

    Works in `output`/.NAME.prepare with `workers` threads (default: one a core). A run that was killed, or that failed
    after some parts were finished, leaves that folder, and the next one takes the finished parts from there.
    Returns lines that say what was skipped; skipped.jsonl beside the records lists everything.
    Raises UserError where the input is not what it should be, where more than the share `max_bad` of its images,
    captions or questions cannot be used, or where the output is already there.
    """
    if name not in BUILDERS:
        raise UserError(f"--dataset={name}: expected one of {', '.join(BUILDERS)}, scenes")
    if not 0 <= max_bad <= 1:
        raise UserError(f"--max_bad={max_bad}: expected a share from 0 to 1")
    if workers is not None and workers < 1:
        raise UserError(f"--workers={workers}: expected at least 1")
    output = Path(output).absolute()
    folder = output / f".{name}.prepare"
    if not folder.exists():
        _check_absent(output / name)
    with _work_folder(folder) as work:
        done = work / _DONE
        if (output / name).exists() and done.exists():  # killed after the output took its name
            return json.loads(done.read_text())
        _check_absent(output / name)
        temporary = work / "prepared"
        shutil.rmtree(temporary, ignore_errors=True)
        lines = _run(name, Path(raw), temporary, work / "parts", max_bad, workers)
        write_text(done, json.dumps(lines))
        _rename(temporary / name, output / name)
    return lines


def build_scenes(
    output: str | os.PathLike,
    *,
    seed: int = 0,
    sizes: Mapping[str, int] | None = None,
    wait: bool = False,
    **options: Any,
) -> None:
    """Writes the procedural world to `output`/raw and both its prepared forms to `output`/coco_captions and /gqa.

    `options` are those of `scenes.write`. Where another process makes the same: an error, or `wait` until it has ended.
    """
    from latent_jax.data import scenes

    def write(raw: Path) -> None:
        scenes.write(raw, seed=seed, sizes=sizes or scenes.SIZES, **options)

    called = {"coco_captions": "scenes, captions", "gqa": "scenes, questions"}
    _build_made(output, write, {"coco_captions": "coco", "gqa": "gqa"}, called, wait)


def build_scenes_benchmark(
    name: str,
    output: str | os.PathLike,
    *,
    seed: int = 0,
    sizes: Mapping[str, int] | None = None,
    wait: bool = False,
) -> None:
    """Writes the procedural world as benchmark `name` (scienceqa, blink, vsp) to `output`/raw and prepares it."""
    from latent_jax.data.scenes import benchmarks

    def write(raw: Path) -> None:
        benchmarks.write(name, raw / name, seed=seed, sizes=sizes)

    _build_made(output, write, {name: name}, {name: f"scenes_{name}"}, wait)


def _build_made(
    output: str | os.PathLike,
    write: Callable[[Path], None],
    folders: Mapping[str, str],
    called: Mapping[str, str],
    wait: bool,
) -> None:
    """Works beside `output`, which appears whole. What a kill leaves there, the next start clears."""
    output = Path(output).absolute()
    folder = output.parent / f".{output.name}.prepare"
    if not folder.exists():
        _check_absent(output)
    with _work_folder(folder, wait) as work:
        _check_absent(output)
        for left in ("prepared", "parts", "made"):
            shutil.rmtree(work / left, ignore_errors=True)
        try:
            write(work / "prepared" / "raw")
            for name, official in folders.items():
                raw, made = work / "prepared" / "raw" / official, work / "made"
                _run(name, raw, made, work / "parts", 0.0, None, called[name])
                os.rename(made / name, work / "prepared" / name)
            _rename(work / "prepared", output)
        finally:
            shutil.rmtree(work / "parts", ignore_errors=True)


def _run(
    name: str, raw: Path, data_dir: Path, work: Path, max_bad: float, workers: int | None, called: str = ""
) -> list[str]:
    module = importlib.import_module(f"latent_jax.data.builders.{name}")
    with _temporary_in(work / "temporary"):
        builder = getattr(module, BUILDERS[name])(
            raw=raw, work=work / name, max_bad=max_bad, workers=workers, data_dir=data_dir, called=called
        )
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS tells of its temporary folders
            builder.build()
    lines = [line for tally in builder.tallies for line in tally.lines()]
    counts = ", ".join(f"{split} {info.num_examples}" for split, info in builder.info.splits.items())
    return [*lines, f"{name}: records {counts}"]


@contextlib.contextmanager
def _temporary_in(folder: Path) -> Iterator[None]:
    """Temporary folders lie in this one: TFDS makes some that it never removes, and a kill leaves all of them."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    earlier, tempfile.tempdir = tempfile.tempdir, str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = earlier
        shutil.rmtree(folder, ignore_errors=True)


def _rename(folder: Path, target: Path) -> None:
    _check_absent(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        os.rename(folder, target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error})") from error


def _check_absent(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: already there; remove it or name another --output")


@contextlib.contextmanager
def _work_folder(folder: Path, wait: bool = False) -> Iterator[Path]:
    """A folder that this process alone works in; it goes at the end, unless a failure leaves finished parts in it."""
    with _locked(folder, wait):
        try:
            yield folder
        except BaseException:
            shutil.rmtree(folder / "prepared", ignore_errors=True)
            if not any(folder.glob("parts/*/*/*.json")):
                _remove(folder)
            raise
        _remove(folder)


def _remove(folder: Path) -> None:
    """The record that all is done, and the lock, go last: a kill on the way leaves what the next start can end."""
    for inside in list(folder.iterdir()):
        if inside.name not in (_DONE, "lock"):
            shutil.rmtree(inside, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)


def _locked(folder: Path, wait: bool) -> TextIO:
    """The folder's lock, held. Whoever held it before may have removed the folder: then it is begun anew."""
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = (folder / "lock").open("w")
        except FileNotFoundError:  # removed between the two
            continue
        except OSError as error:
            raise UserError(f"{folder}: cannot be written ({error})") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            lock.close()
            raise UserError(f"{folder}: another process prepares this dataset here") from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock.fileno()), os.stat(folder / "lock")):
                return lock
        lock.close()
