"""Where a run stands, on standard error: a bar on a terminal, a line now and then in a log file."""

import sys
import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

# A log file wants to be read afterwards: the first and last step, and in between at most one line in this many seconds.
_SECONDS_BETWEEN_LINES = 15.0
_SHOWN = {
    "loss/total": "loss {:.4g}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "items_per_second": "{:.2f} items/s",
    "correct": "{:.1f} % right",
}


class Progress:
    """Shows step, loss, tokens per second and the time left.

    Args:
      total: steps of the whole run; first: the step it starts from (restored steps are no work of this process). How
        long the rest takes is estimated from the first update on: what comes before it is compiled, once.
      unit: what a step is called; title: what stands before it.
      enabled: False shows no progress (`log.progress`); what is said is said all the same.
      mute: says nothing either (every host but the first).
    """

    def __init__(
        self,
        total: int,
        first: int = 0,
        enabled: bool = True,
        stream: Any = None,
        unit: str = "step",
        mute: bool = False,
        title: str = "",
    ):
        self._unit, self._total, self._title = unit, total, f"{title}: " if title else ""
        self._enabled, self._mute = enabled and not mute, mute
        self._stream = stream or sys.stderr
        self._counted: tuple[int, float] | None = None  # step and clock of the first update
        self._told: float | None = None  # clock of the last line
        terminal = self._enabled and self._stream.isatty()
        self._bar = (
            tqdm(
                total=total,
                initial=first,
                file=self._stream,
                unit=unit,
                desc=title or None,
                dynamic_ncols=True,
                smoothing=0.05,
            )
            if terminal
            else None
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, step: int, values: Mapping) -> None:
        """Says that `step` steps are finished. Of `values`, those of `_SHOWN` are shown. After the last one the bar is
        left as it stands: what follows (a checkpoint, an export, a report) is no work of these steps."""
        if not self._enabled:
            return
        shown = _summary(values)
        now = time.monotonic()
        begun, counted = self._counted is None, self._counted or (step, now)
        self._counted = counted
        if self._bar is not None:
            self._bar.set_postfix_str(shown, refresh=False)
            if begun:
                self._bar.initial = self._bar.n = step
                self._bar.unpause()
                self._bar.refresh()
            self._bar.update(step - self._bar.n)
            if step >= self._total:
                self.close()
            return
        if self._told is None or step >= self._total or now - self._told >= _SECONDS_BETWEEN_LINES:
            self._told = now
            left = f"  left {self._left(step, now, *counted)}" if step != counted[0] or step >= self._total else ""
            self.say(f"{self._title}{self._unit} {step}/{self._total}  {shown}{left}".rstrip())

    def say(self, line: str) -> None:
        """Prints a line without breaking the bar, shown or not."""
        if self._mute:
            return
        if self._bar is not None:
            self._bar.write(line, file=self._stream)
        else:
            print(line, file=self._stream, flush=True)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _left(self, step: int, now: float, first: int, began: float) -> str:
        return tqdm.format_interval((now - began) / max(step - first, 1) * (self._total - step))


def _summary(values: Mapping) -> str:
    return "  ".join(form.format(float(values[name])) for name, form in _SHOWN.items() if values.get(name) is not None)
