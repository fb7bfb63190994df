"""How a command begins and ends: its flags, its status, and what it says in one line where something is wrong.

0    done
2    bad input, a file system that fails, too little memory: one line `error: ...` on standard error
141  standard output has no reader any more, as behind `| head` (128 + SIGPIPE): no line
130  Ctrl-C (128 + SIGINT): one line; 143 where SIGTERM ended a run after its checkpoint (128 + SIGTERM)
"""

import argparse
import contextlib
import functools
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, ParamSpec, TypeVar

from latent_jax.errors import Stopped, UserError, one_line, os_error, say_line

if TYPE_CHECKING:
    from sys import UnraisableHookArgs as UnraisableHookArgs
else:  # a type of the checker's alone
    UnraisableHookArgs = Any

Given = ParamSpec("Given")
Result = TypeVar("Result")


class Parser(argparse.ArgumentParser):
    """Flags of a command. What is wrong with them is one line, as every other error."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def command(main: Callable[Given, Result]) -> Callable[Given, Result]:
    """Decorates a command's `main`: whatever ends it early is one line on standard error and a status.

    Code that catches exceptions broadly, and callbacks out of C++, can swallow a KeyboardInterrupt or turn it into
    another error. The signal is therefore remembered, and whatever error follows it counts as the interrupt.
    """

    @functools.wraps(main)
    def run(*arguments: Given.args, **options: Given.kwargs) -> Result:
        interrupted = threading.Event()

        def interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
            interrupted.set()
            raise KeyboardInterrupt

        in_main = threading.current_thread() is threading.main_thread()
        earlier = signal.signal(signal.SIGINT, interrupt) if in_main else None
        hook, sys.unraisablehook = sys.unraisablehook, _end_where_swallowed(sys.unraisablehook)
        try:
            return main(*arguments, **options)
        except Exception as problem:
            if interrupted.is_set():
                _end(130, "interrupted")
            if isinstance(problem, BrokenPipeError) and _output_closed():
                raise SystemExit(128 + signal.SIGPIPE) from None
            if isinstance(problem, UserError):
                _end(2, f"error: {one_line(problem)}")
            if isinstance(problem, OSError):
                _end(2, f"error: {os_error(problem)}")
            if isinstance(problem, MemoryError) or "RESOURCE_EXHAUSTED" in str(problem):  # the host's, or a device's
                _end(2, f"error: not enough memory: {one_line(problem) or 'this machine has less than was asked for'}")
            raise
        except KeyboardInterrupt:
            _end(130, "interrupted")
        finally:
            sys.unraisablehook = hook
            if in_main:
                signal.signal(signal.SIGINT, earlier)

    return run


def _output_closed() -> bool:
    """Whether standard output has no reader any more (`| head`), which is no error; it then takes what is left."""
    try:
        number, waiting = sys.stdout.fileno(), select.poll()
        waiting.register(number, select.POLLOUT)
        closed = any(event & select.POLLERR for _, event in waiting.poll(0))
    except (OSError, ValueError, AttributeError):
        return False
    if closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    return closed


def begin_command() -> None:
    """Before a command's imports: Ctrl-C during them is one line too, and standard error may fail or be closed.

    XLA and transformers read from the environment how much they say. XLA's warnings are about its own work (a buffer
    that is larger than a heap of `devices.compiler_options`, one line each) and its errors are still said;
    transformers advises to install torch, which nothing but comparisons needs.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    hook = sys.excepthook

    def say(kind: type[BaseException], value: BaseException, trace: TracebackType | None) -> None:
        if not issubclass(kind, KeyboardInterrupt):
            hook(kind, value, trace)
            return
        say_line("interrupted")
        # An exit status cannot be chosen here, and the interpreter's own ends the process by the signal.
        sys.stderr.flush()
        os._exit(130)

    sys.excepthook = say
    _open_standard_streams()
    if not isinstance(sys.stderr, _Tolerant):
        sys.stderr = _Tolerant(sys.stderr)


def _open_standard_streams() -> None:
    """Where a standard stream is closed, its number goes to the null device.

    Else the next file that is opened gets the number, and what XLA writes to standard error goes into a checkpoint.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, which is this one
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115 (open for good)


def _end(status: int, line: str) -> NoReturn:
    say_line(line)
    raise SystemExit(status) from None


def _end_where_swallowed(hook: Callable[[UnraisableHookArgs], object]) -> Callable[[UnraisableHookArgs], None]:
    def end(unraisable: UnraisableHookArgs) -> None:
        # Raised in a callback that cannot raise (jax's of the garbage collector): Python would print it and go on.
        if issubclass(unraisable.exc_type or Exception, KeyboardInterrupt):
            say_line("interrupted")
            os._exit(130)
        if isinstance(unraisable.exc_value, Stopped):
            os._exit(unraisable.exc_value.code)
        if isinstance(unraisable.exc_value, RuntimeError) and str(unraisable.exc_value) == "Event loop is closed":
            # What tensorstore reads or writes beside something that failed, whose error is raised where it counts.
            return
        hook(unraisable)

    return end


class _Tolerant:
    """Standard error that never fails: a log disk that is full, or a reader that went away, must not end a run."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except (OSError, ValueError, AttributeError):
            return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            self._stream.flush()

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
