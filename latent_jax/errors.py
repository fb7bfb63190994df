"""The one exception that stands for a mistake in what the user gave us, and messages in one line."""

import contextlib
import errno
import os
import sys


class UserError(Exception):
    """Bad input. The message is one line: which file, record or key, and what was expected.

    Commands print it as `error: MESSAGE` on standard error and exit with status 2.
    """


class Stopped(SystemExit):
    """A run that a signal ended in order, after it saved what it had: status 128 + the signal's number."""

    code: int

    def __init__(self, number: int):
        super().__init__(128 + number)


def one_line(problem: BaseException | str) -> str:
    """The message without line breaks, of which libraries may have many, or what a terminal would obey: names that
    stand in a file may hold both."""
    line = " ".join(str(problem).split())
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


def os_error(problem: OSError) -> str:
    """One line for what the operating system refused: the file first, where it is known."""
    reason = problem.strerror or one_line(problem) or type(problem).__name__
    if isinstance(problem, FileNotFoundError):
        reason = "no such file" if problem.filename else "no such file; was the current directory removed?"
    if isinstance(problem, FileExistsError):  # of a folder that is to be made where there is none
        reason = "is there and not a directory; expected a directory, or nothing"
    file = problem.filename
    # Of a copy both are known, and what a full disk refuses is the copy.
    if problem.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS) and problem.filename2 is not None:
        file = problem.filename2
    return one_line(f"{os.fsdecode(file)}: {reason}" if isinstance(file, str | bytes) else reason)


def say_line(line: str) -> None:
    """Prints a line on standard error; a stream that is closed or full is no reason to fail."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        print(line, file=sys.stderr, flush=True)
