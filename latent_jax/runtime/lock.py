"""One writer a workdir: a lock that ends with the process that holds it, however that ends."""

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from latent_jax.errors import UserError
from latent_jax.runtime import files

NAME = ".lock"
# What a file system answers that knows no locks, or (NFS: EBADF) none of a directory: then nobody is kept out, and
# nobody is stopped by it.
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EBADF)


@contextlib.contextmanager
def only_writer(directory: str | Path) -> Iterator[None]:
    """Holds `directory`, which is made where there is none, for as long as the block runs.

    The kernel lets go of the lock when its process ends, so a killed run leaves none; the file stays, empty. What an
    earlier writer was writing when it was killed (`files.whole`) is removed. Raises UserError where another process
    holds the directory.
    """
    directory = Path(directory)
    if os.path.lexists(directory) and not directory.is_dir():
        raise UserError(f"{directory}: not a directory; expected a new one, or that of an earlier run")
    new = not directory.exists()
    descriptor, held = _opened(directory)
    try:
        if held:
            with files.naming(directory / NAME):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"{os.getpid()}\n".encode())
            files.clear_partial(directory)
        yield
    finally:
        if new:
            _remove_unused(directory)
        os.close(descriptor)


def taken(descriptor: int) -> bool:
    """Takes the lock of an open file, without waiting. False where the file system knows no locks.

    Raises BlockingIOError where another process holds it.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as problem:
        if problem.errno not in _NO_LOCKS:
            raise
        return False
    return True


def _opened(directory: Path) -> tuple[int, bool]:
    """The descriptor of the directory's lock file, and whether its lock is held."""
    while True:
        directory.mkdir(parents=True, exist_ok=True)
        try:
            # O_NOFOLLOW: what a link points to is not ours to empty.
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            descriptor = os.open(directory / NAME, flags, 0o666)
        except FileNotFoundError:  # who held it removed the directory between the two
            continue
        except OSError as problem:
            if problem.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
                raise
            raise UserError(f"{directory / NAME}: not a regular file; remove it") from None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise UserError(f"{directory / NAME}: not a regular file; remove it")
        try:
            held = taken(descriptor)
            if not held or os.path.samestat(os.fstat(descriptor), os.stat(directory / NAME)):
                return descriptor, held
        except FileNotFoundError:  # as above, between opening and locking: this is the lock of nothing
            pass
        except BlockingIOError:
            holder = _holder(descriptor)
            os.close(descriptor)
            raise UserError(
                f"{directory}: another process writes to it (process {holder}); wait for it to end, stop it, or use "
                "another --workdir"
            ) from None
        os.close(descriptor)


def _remove_unused(directory: Path) -> None:
    """Removes a directory in which nothing was begun, while its lock is held: whoever waits for it makes a new one."""
    with contextlib.suppress(OSError):  # it may be gone, and what ended the run is to be told
        if {path.name for path in directory.iterdir()} == {NAME}:
            (directory / NAME).unlink()
            directory.rmdir()


def _holder(descriptor: int) -> str:
    return os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
