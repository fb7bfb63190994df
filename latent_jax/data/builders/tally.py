"""What a builder skips: counted, listed, and an error beyond a stated share."""

import collections
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from latent_jax.errors import UserError

_LISTED, _LONGEST = 10, 500
_Reason = tuple[str, int]  # and how many records it is of
# What costs no record that was there: a link that had died when the set was downloaded (commonly a fifth of a web-scale
# set), or a list of those that cannot be read. Counted and listed, but no sign of broken files.
UNLIMITED = frozenset({"download", "list"})


class Tally:
    """Counts of the records of one split that were looked at and of those that were skipped, by kind.

    A kind ("image", "caption", "question") has its own share: three broken images are not hidden by a million captions.
    """

    def __init__(self, split: str):
        self.split = split
        self._seen: collections.Counter[str] = collections.Counter()
        self._skipped: dict[str, list[_Reason]] = collections.defaultdict(list)
        self._notes: list[str] = []

    def see(self, kind: str, count: int = 1) -> None:
        self._seen[kind] += count

    def skip(self, kind: str, reason: str, count: int = 1) -> None:
        """Notes `count` records that were seen and cannot be used, for one `reason` that names them."""
        # A name in an annotation file may have thousands of characters, or such as would steer a terminal.
        reason = reason if reason.isprintable() else ascii(" ".join(reason.split()))[1:-1]
        self._skipped[kind].append((reason if len(reason) <= _LONGEST else f"{reason[:_LONGEST]} ...", count))

    def note(self, line: str) -> None:
        """Something that the user should know and that cost no record."""
        self._notes.append(line)

    def skipped(self) -> Iterator[tuple[str, str, int]]:
        """(kind, reason, records) of everything that was skipped."""
        return ((kind, *each) for kind, reasons in self._skipped.items() for each in reasons)

    def state(self) -> dict[str, Any]:
        """Plain values, from which `add` restores everything."""
        return {"seen": dict(self._seen), "skipped": dict(self._skipped), "notes": self._notes}

    def add(self, states: Iterable[Mapping[str, Any]]) -> None:
        """Adds what other tallies of the split counted, in order."""
        for state in states:
            self._seen.update(state["seen"])
            for kind, reasons in state["skipped"].items():
                self._skipped[kind].extend((reason, count) for reason, count in reasons)
            self._notes.extend(state["notes"])

    def lines(self) -> list[str]:
        """A line a kind that lost records, then the first few reasons; then the notes."""
        lines = []
        for kind, reasons in self._skipped.items():
            lines.append(f"{self.split}: skipped {_total(reasons)} of {self._seen[kind]} {kind}s")
            if kind == "download":
                lines.append("  links that were dead when the set was downloaded; each is in skipped.jsonl")
                continue
            lines += [f"  {reason}" for reason, _ in reasons[:_LISTED]]
            if len(reasons) > _LISTED:
                lines.append(f"  and {len(reasons) - _LISTED} more in skipped.jsonl")
        return lines + [f"{self.split}: {note}" for note in self._notes]

    def check(self, max_bad: float) -> None:
        """Raises UserError where more than the share `max_bad` of a kind was skipped."""
        for kind, reasons in self._skipped.items():
            if kind not in UNLIMITED and _total(reasons) > max_bad * self._seen[kind]:
                raise UserError(
                    f"{self.split}: {_total(reasons)} of {self._seen[kind]} {kind}s cannot be used, more than "
                    f"--max_bad={max_bad:g} allows; the first: {reasons[0][0]}"
                )


def _total(reasons: Iterable[_Reason]) -> int:
    return sum(count for _, count in reasons)
