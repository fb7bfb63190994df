"""Files that are whole or absent, and where those are kept that are made once for all runs."""

import contextlib
import hashlib
import json
import os
import secrets
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from latent_jax.errors import UserError, os_error

# No configuration, index or sidecar is near this size: more is another file under its name. Lists of records may be
# larger (GQA's scene graphs), and their readers say so.
MOST_JSON = 64 * 2**20
_MOST = 2**30  # of any file that is read whole: half a million predictions of two thousand bytes, say
PARTIAL = ".partial"  # ends the temporary name of a file that is being written
_CONTENT, _SUM = "content", "checksum"


def cache_directory() -> Path:
    """Where compiled programs and generated data are kept: $LATENT_JAX_CACHE, else ~/.cache/latent_jax."""
    named: str | Path | None = os.environ.get("LATENT_JAX_CACHE")
    if not named:
        try:
            named = Path.home() / ".cache" / "latent_jax"
        except RuntimeError:  # a user without HOME that the system does not know, as containers have them
            named = Path(tempfile.gettempdir()) / f"latent_jax-{os.getuid()}"
    return Path(named).absolute()


def write_text(path: str | Path, text: str) -> None:
    """Writes `text` to `path` in one step: a reader or a kill sees the old file or the new, nothing between."""
    with whole(path) as file:
        file.write(text.encode())


def read_bytes(path: str | Path, most: int | None = _MOST) -> bytes:
    """A regular file's content. Raises UserError that names the file where it is none, or has over `most` bytes.

    A device, a FIFO or a socket under the name of a file would be read for ever.
    """
    try:
        # O_NONBLOCK: opening a FIFO that nobody writes to must not wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):  # before fdopen, which refuses a folder without naming it
            os.close(descriptor)
            raise UserError(f"{path}: not a regular file")
        with naming(path), os.fdopen(descriptor, "rb") as file:
            if most is not None and found.st_size > most:
                raise UserError(f"{path}: {found.st_size:,} bytes, expected at most {most:,}")
            return file.read()
    except (OSError, ValueError) as problem:  # ValueError: a name with a NUL character
        raise UserError(os_error(problem) if isinstance(problem, OSError) else f"{str(path)!r}: {problem}") from None


def read_json(
    path: str | Path,
    kind: type | tuple[type, ...] = dict,
    expected: str = "a JSON object",
    most: int | None = MOST_JSON,
    loads: Callable[[str], Any] = json.loads,
) -> Any:
    """The content of a JSON file, a `kind`. Raises UserError that names the file and what was `expected` of it."""
    data = read_bytes(path, most)
    try:
        # UTF-8 alone, with or without a byte order mark: json.loads of bytes would guess among five encodings.
        content = loads(data.decode("utf-8-sig"))
    except RecursionError:
        raise UserError(f"{path}: expected {expected}, but it is nested too deeply") from None
    except ValueError as problem:
        raise UserError(f"{path}: expected {expected}, but it cannot be read as JSON ({problem})") from None
    if not isinstance(content, kind):
        raise UserError(f"{path}: expected {expected}, got a {type(content).__name__}")
    return content


@contextlib.contextmanager
def whole(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write that takes the name `path` when the block ends; where it raises, `path` stays as it was."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    start = os.fsdecode(os.fsencode(path.name)[:64])  # the limit of a name is in bytes
    # Not tempfile's: its files are private, and a run's records are as readable as any file of their directory.
    temporary = path.with_name(f".{start}.{os.getpid()}.{secrets.token_hex(4)}{PARTIAL}")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            # Without it a crash of the machine can leave the new name with no content behind it.
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as problem:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(problem, OSError) and problem.filename in (None, str(temporary)):
            problem.filename = str(path)
        raise


def clear_partial(directory: str | Path) -> None:
    """Removes what `whole` was writing in `directory` when its process was killed. Nobody else may write there."""
    for path in Path(directory).glob(f".*{PARTIAL}"):
        if path.is_file():
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Gives an OSError that knows no file (a write to one that is open) the name of this one."""
    try:
        yield
    except OSError as problem:
        if problem.filename is None:
            problem.filename = os.fspath(path)
        raise


def checksum(data: bytes | str) -> str:
    """A short checksum of a small document that is read back: damage is noticed, nothing is kept secret."""
    data = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    return hashlib.sha256(data).hexdigest()[:16]


def as_json(value: Any) -> str:
    """A JSON document for people too."""
    return json.dumps(value, indent=2) + "\n"


def sealed(content: Mapping) -> dict:
    """A JSON document and its own checksum."""
    content = json.loads(json.dumps(dict(content)))  # as it will be read back
    return {_CONTENT: content, _SUM: checksum(json.dumps(content, sort_keys=True))}


def opened(document: dict) -> dict:
    """What `sealed` took. Raises ValueError where it is damaged; documents of earlier versions are not sealed."""
    if set(document) != {_CONTENT, _SUM}:
        if _SUM in document or _CONTENT in document:
            raise ValueError("is not what was saved (no checksum)")
        return document
    if checksum(json.dumps(document[_CONTENT], sort_keys=True)) != document[_SUM]:
        raise ValueError("is not what was saved (checksum)")
    if not isinstance(document[_CONTENT], dict):
        raise ValueError("holds no object")
    return document[_CONTENT]
