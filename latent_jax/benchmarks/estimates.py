"""Metrics with 95 % confidence half-widths, all in percent.

Means: half the length of Wilson's interval with n / deff questions, where the design effect deff >= 1 is the
cluster-robust variance over the binomial one: questions about one image count as the fewer independent ones they are.
Without shared images deff is 1; at 0 or 100 % every cluster counts once. (Miller, "Adding error bars to
evals", 2024, for clustered questions; Korn and Graubard, 1998, for the effective number.)
Averages of metrics: their half-widths added in squares. What is no mean is bootstrapped over clusters.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction

import numpy as np

Z = 1.959963984540054  # 97.5 % quantile of the standard normal distribution
RESAMPLES = 1000


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A metric: its exact value and 95 % half-width in percent, and the number of values behind it."""

    value: Fraction
    half_width: float
    n: int


def mean(values: Iterable[int | bool | Fraction], clusters: Iterable[str]) -> Estimate | None:
    """The mean of values in [0, 1]; None of nothing."""
    exact = [Fraction(value) for value in values]
    n = len(exact)
    if not n:
        return None
    share = sum(exact, Fraction(0)) / n
    effective = _effective(exact, list(clusters), float(share))
    spread = float(share * (1 - share)) / effective + Z**2 / (4 * effective**2)
    return Estimate(100 * share, 100 * Z / (1 + Z**2 / effective) * math.sqrt(spread), n)


def _effective(values: Sequence[Fraction], clusters: Sequence[str], share: float) -> float:
    """The number of independent questions that carry as much information."""
    residuals: dict[str, float] = defaultdict(float)
    for value, cluster in zip(values, clusters, strict=True):
        residuals[cluster] += float(value) - share
    n, count = len(values), len(residuals)
    if count == 1 or share in (0, 1):
        return count
    # n - 1 as count - 1: of clusters of one question the effect is exactly 1.
    variance = count / (count - 1) * sum(residual**2 for residual in residuals.values()) / n**2
    return n / max(1.0, variance / (share * (1 - share) / (n - 1)))


def average(estimates: Sequence[Estimate]) -> Estimate:
    """The unweighted average of independent metrics (a macro average)."""
    count = len(estimates)
    half_width = math.sqrt(sum(estimate.half_width**2 for estimate in estimates)) / count
    value = sum((estimate.value for estimate in estimates), Fraction(0)) / count
    return Estimate(value, half_width, sum(e.n for e in estimates))


def bootstrap(
    value: Fraction, n: int, statistic: Callable[[np.ndarray], np.ndarray], clusters: int, seed: int
) -> Estimate:
    """A metric that is no mean: 1.96 standard deviations over RESAMPLES resamples of the clusters.

    statistic: weights (resamples, clusters), how often each cluster was drawn -> values (resamples,) in percent.
    """
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(clusters, np.full(clusters, 1 / clusters), RESAMPLES)
    found = statistic(drawn)
    return Estimate(value, Z * float(np.std(found[np.isfinite(found)])), n)


def present(estimates: dict[str, Estimate | None]) -> dict[str, Estimate]:
    """Without the metrics that no question belongs to."""
    return {name: estimate for name, estimate in estimates.items() if estimate is not None}
