"""A polite end: the first SIGTERM or SIGINT asks the loop to save and stop, the second ends the process at once."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextlib.contextmanager
def watch() -> Iterator[Callable[[], bool]]:
    """Gives a function that says whether this process was asked to stop. The earlier handlers come back at the end.

    Only a main thread can listen; elsewhere the answer is always False.
    """
    asked = threading.Event()

    def handle(number, _frame):
        if asked.is_set():
            # Not sys.exit: a save that hangs would hang this too. 128 + n is the shell's word for "ended by signal n".
            os._exit(128 + number)
        asked.set()
        name = signal.Signals(number).name
        # os.write: a print may be interrupted in the middle of another print, which is an error.
        os.write(
            sys.stderr.fileno(), f"\n{name}: saving a checkpoint after this step; again to stop at once\n".encode()
        )

    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    earlier = {number: signal.signal(number, handle) for number in _SIGNALS}
    try:
        yield asked.is_set
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
