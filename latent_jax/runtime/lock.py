"""One writer a workdir: a lock that ends with the process that holds it, however that ends."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from latent_jax.errors import UserError
from latent_jax.runtime import files

NAME = ".lock"
# What a file system answers that knows no locks: then nobody is kept out, and nobody is stopped by it.
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@contextlib.contextmanager
def only_writer(directory: str | Path) -> Iterator[None]:
    """Holds `directory`, which is made where there is none, for as long as the block runs.

    The kernel lets go of the lock when its process ends, so a killed run leaves none; the file stays, empty. What an
    earlier writer was writing when it was killed (`files.whole`) is removed. Raises UserError where another process
    holds the directory.
    """
    directory = Path(directory)
    new = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(directory / NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{directory}: another process writes to it (process {_holder(descriptor)}); wait for it to end, stop "
                "it, or use another --workdir"
            ) from None
        except OSError as problem:
            if problem.errno not in _NO_LOCKS:
                raise
        else:
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"{os.getpid()}\n".encode())
            files.clear_partial(directory)
        yield
    finally:
        if new and {path.name for path in directory.iterdir()} == {NAME}:
            # Nothing was begun, so nothing stays. Unlinked while it is held: whoever waits for it makes a new one.
            (directory / NAME).unlink()
            directory.rmdir()
        os.close(descriptor)


def _holder(descriptor: int) -> str:
    return os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
