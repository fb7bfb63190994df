"""What a builder skips: counted, listed, and an error beyond a stated share."""

import collections

from latent_jax.errors import UserError

_LISTED = 10


class Tally:
    """Counts of the records of one split that were looked at and of those that were skipped, by kind.

    A kind ("image", "caption", "question") has its own share: three broken images are not hidden by a million captions.
    """

    def __init__(self, split: str):
        self.split = split
        self._seen = collections.Counter()
        self._skipped = collections.defaultdict(list)

    def see(self, kind: str) -> None:
        self._seen[kind] += 1

    def skip(self, kind: str, reason: str) -> None:
        """Notes a record that was seen and cannot be used; `reason` names it."""
        self._skipped[kind].append(reason)

    def lines(self) -> list[str]:
        """A line a kind that lost records, then the first few reasons."""
        lines = []
        for kind, reasons in self._skipped.items():
            lines.append(f"{self.split}: skipped {len(reasons)} of {self._seen[kind]} {kind}s")
            lines += [f"  {reason}" for reason in reasons[:_LISTED]]
            if len(reasons) > _LISTED:
                lines.append(f"  and {len(reasons) - _LISTED} more")
        return lines

    def check(self, max_bad: float) -> None:
        """Raises UserError where more than the share `max_bad` of a kind was skipped."""
        for kind, reasons in self._skipped.items():
            if len(reasons) > max_bad * self._seen[kind]:
                raise UserError(
                    f"{self.split}: {len(reasons)} of {self._seen[kind]} {kind}s cannot be used, more than --max_bad="
                    f"{max_bad:g} allows; the first: {reasons[0]}"
                )
