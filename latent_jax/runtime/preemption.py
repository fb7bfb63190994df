"""A polite end: the first SIGTERM or SIGINT asks the loop to save and stop, the second ends the process at once."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from latent_jax.errors import Stopped

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Asked:
    """Calling it says whether this process was asked to stop; `number` is the signal that asked, or 0.

    Once everything is saved (`at_once`) nothing is left to wait for: from then on a signal raises Stopped.
    """

    def __init__(self, promise: str):
        self.number, self.stopped, self._promise = 0, False, promise
        self._saved = ""

    def __call__(self) -> bool:
        return bool(self.number)

    def at_once(self, doing: str) -> None:
        """From here on a signal ends the run where it is, in what `doing` names. One that came before counts too."""
        self._saved = doing
        if self.number:
            self._stop()

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.number:
            # Not sys.exit: a save that hangs would hang this too. 128 + n is the shell's word for "ended by signal n".
            os._exit(128 + number)
        self.number = number
        if self._saved:
            self._stop()
        _say(f"{signal.Signals(number).name}: {self._promise}; again to stop at once")

    def _stop(self) -> None:
        self.stopped = True
        _say(f"{signal.Signals(self.number).name}: stopped during {self._saved}; the same command goes on from there")
        raise Stopped(self.number)


@contextlib.contextmanager
def watch(promise: str = "saving a checkpoint after this step") -> Iterator[Asked]:
    """Listens as long as the block runs; the first signal is answered with `promise`. The earlier handlers come back.

    Only a main thread can listen; elsewhere the answer is always False.
    """
    asked = Asked(promise)
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    earlier = {number: signal.signal(number, asked._handle) for number in _SIGNALS}
    try:
        yield asked
    except Exception:
        # A callback out of C++ turns Stopped into an error of its own.
        if asked.stopped:
            raise Stopped(asked.number) from None
        raise
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _say(line: str) -> None:
    # os.write: a print may be interrupted in the middle of another print, which is an error. A stream that is closed
    # or full is no reason to fail.
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.write(sys.stderr.fileno(), f"\n{line}\n".encode())
