"""Runs a builder so that its output appears only when it is complete."""

import contextlib
import io
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

from latent_jax.errors import UserError

BUILDERS = ("coco_captions", "gqa")
MAX_BAD = 0.05


def build(name: str, raw: str | os.PathLike, output: str | os.PathLike, *, max_bad: float = MAX_BAD) -> list[str]:
    """Turns dataset `name` in its official form at `raw` into `output`/NAME/VERSION/*.array_record*.

    Returns lines that say what was skipped. Raises UserError where the input is not what it should be, where more than
    the share `max_bad` of its images, captions or questions cannot be used, or where the output is already there.
    """
    if name not in BUILDERS:
        raise UserError(f"--dataset={name}: expected one of {', '.join(BUILDERS)}, scenes")
    if not 0 <= max_bad <= 1:
        raise UserError(f"--max_bad={max_bad}: expected a share from 0 to 1")
    output = Path(output)
    with _appearing(output / name) as temporary:
        lines = _run(name, Path(raw), temporary, max_bad)
        # TFDS writes NAME/VERSION below its data_dir; what must appear at once is NAME.
        for version in (temporary / name).iterdir():
            version.rename(temporary / version.name)
        (temporary / name).rmdir()
    return lines


def build_scenes(
    output: str | os.PathLike, *, seed: int = 0, sizes: Mapping[str, int] | None = None, **options
) -> None:
    """Writes the procedural world to `output`/raw and both its prepared forms to `output`/coco_captions and /gqa.

    `options` are those of `scenes.write`.
    """
    from latent_jax.data import scenes

    with _appearing(Path(output)) as temporary:
        scenes.write(temporary / "raw", seed=seed, sizes=sizes or scenes.SIZES, **options)
        _run("coco_captions", temporary / "raw" / "coco", temporary, 0.0)
        _run("gqa", temporary / "raw" / "gqa", temporary, 0.0)


def _run(name, raw, data_dir, max_bad):
    from latent_jax.data.builders.coco_captions import CocoCaptions
    from latent_jax.data.builders.gqa import Gqa

    builder = {"coco_captions": CocoCaptions, "gqa": Gqa}[name](raw=raw, max_bad=max_bad, data_dir=data_dir)
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS tells of its temporary folders
        builder.build()
    return [line for tally in builder.tallies for line in tally.lines()]


@contextlib.contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder`, which it becomes at the end; on any failure it is gone."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: already there; remove it or name another --output")
    temporary = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        temporary.mkdir(parents=True)
        yield temporary
        os.rename(temporary, folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
