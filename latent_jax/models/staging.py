"""A directory that takes another's place whole: built beside it, swapped in, and recovered after a kill at any moment.

Beside DIR stand, while it is replaced: .DIR.partial (being built), .DIR.new (complete), .DIR.old (the earlier one).
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


def _beside(directory: Path) -> tuple[Path, Path, Path]:
    partial, new, old = (directory.with_name(f".{directory.name}.{state}") for state in ("partial", "new", "old"))
    return partial, new, old


def recover(directory: str | Path) -> None:
    """Ends what a kill left half-done: the newest directory that was complete stands under its name, alone."""
    directory = Path(directory).absolute()
    partial, new, old = _beside(directory)
    for complete in (new, old):
        if complete.exists() and not directory.exists():
            os.rename(complete, directory)
    for left in (partial, new, old):
        shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def staged(directory: str | Path) -> Iterator[Path]:
    """A directory beside the given one that takes its place if the block succeeds and is removed if it fails.

    Where the swap itself fails, the earlier directory stands under its name again; where even that is refused, both
    stay beside it for `recover`.
    """
    directory = Path(directory).absolute()
    recover(directory)
    partial, new, old = _beside(directory)
    partial.mkdir(parents=True)
    try:
        yield partial
        os.rename(partial, new)
        if directory.exists():
            os.rename(directory, old)
        os.rename(new, directory)
    except BaseException:
        if old.exists() and not directory.exists():
            os.rename(old, directory)  # where this raises too, nothing is removed
        for left in (partial, new):
            shutil.rmtree(left, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
