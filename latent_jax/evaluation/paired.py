"""Paired statistics of two evaluations of the same questions."""

import os
from fractions import Fraction
from pathlib import Path

import numpy as np

from latent_jax.config.fields import shown
from latent_jax.errors import UserError
from latent_jax.evaluation import predictions

RESAMPLES = 10_000
_SAME = ("benchmark", "split", "scorer", "scorer_version", "prompt")
_CHUNK = 500  # resamples at a time, so that memory stays small


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided exact p value of the discordant pairs: binomial with chance one half (McNemar, 1947)."""
    n, k = only_a + only_b, min(only_a, only_b)
    term, tail = 1, 1
    for i in range(k):
        term = term * (n - i) // (i + 1)
        tail += term
    return float(min(Fraction(1), Fraction(2 * tail, 2**n)))


def compare(a: Path, b: Path, seed: int = 0) -> dict:
    """Differences in percent: {"n", "a", "b", "difference", "low", "high", "only_a", "only_b", "mcnemar", "sign_flip"}.

    `sign_flip` is None where no image has two questions. Raises UserError where the two were not asked the same
    questions under the same protocol.
    """
    if seed < 0:
        raise UserError(f"seed: got {seed}, expected an integer of at least 0")
    pairs, clusters = _paired(a, b)
    n, gains = len(pairs), pairs[:, 1].astype(int) - pairs[:, 0]
    only_a, only_b = int((gains < 0).sum()), int((gains > 0).sum())
    _, cluster = np.unique(clusters, return_inverse=True)
    count = cluster.max() + 1
    gain = np.bincount(cluster, gains, count)
    low, high = np.quantile(_bootstrap(gain, np.bincount(cluster, minlength=count), seed), [0.025, 0.975])
    return {
        "n": n,
        "clusters": int(count),
        **{name: 100 * float(pairs[:, i].mean()) for i, name in enumerate("ab")},
        "difference": 100 * (only_b - only_a) / n,
        "low": 100 * float(low),
        "high": 100 * float(high),
        "only_a": only_a,
        "only_b": only_b,
        "mcnemar": mcnemar(only_a, only_b),
        "sign_flip": _sign_flip(gain, seed) if count < n else None,
    }


def _paired(a: Path, b: Path) -> tuple[np.ndarray, list[str]]:
    """Right or wrong (questions, 2), and the cluster of every question."""
    for name, directory in (("a", a), ("b", b)):
        if not directory.is_dir():
            raise UserError(f"--{name}={directory}: no such directory; expected the workdir of a finished evaluation")
    if os.path.realpath(a) == os.path.realpath(b):
        raise UserError(f"--a={a}, --b={b}: are the same; expected two evaluations")
    (results_a, lines_a), (results_b, lines_b) = predictions.read(a), predictions.read(b)
    for key in _SAME:
        if results_a.get(key) != results_b.get(key):
            raise UserError(
                f"{key} differs, {results_a.get(key)!r} in {a} and {results_b.get(key)!r} in {b}: numbers of different "
                "protocols cannot be compared"
            )
    right_a, right_b = ({line["id"]: line for line in lines} for lines in (lines_a, lines_b))
    if alone := right_a.keys() ^ right_b.keys():
        raise UserError(f"{len(alone)} questions stand in one of {a} and {b} only, such as {min(alone)}")
    for name, line in right_a.items():
        for key in ("prompt", "answer", "cluster"):
            if line.get(key) != right_b[name].get(key):
                raise UserError(
                    f"{b / predictions.PREDICTIONS}: question {name} has {key} {shown(right_b[name].get(key))}, and "
                    f"{shown(line.get(key))} in {a}: the two were not asked the same"
                )
        if (line["correct"] is None) != (right_b[name]["correct"] is None):
            raise UserError(f"question {name} is scored in one of {a} and {b} only; expected both or neither")
    shared = [name for name in right_a if right_a[name]["correct"] is not None]
    if not shared:
        raise UserError(f"{a}: no answer could be scored, so there is nothing to compare")
    pairs = np.array([[right_a[name]["correct"], right_b[name]["correct"]] for name in shared], bool)
    return pairs, [right_a[name]["cluster"] for name in shared]


def _bootstrap(gain: np.ndarray, size: np.ndarray, seed: int) -> np.ndarray:
    """Mean gains of RESAMPLES resamples of the clusters."""
    rng, count = np.random.default_rng(seed), len(gain)
    found = []
    for _ in range(RESAMPLES // _CHUNK):
        drawn = rng.integers(count, size=(_CHUNK, count))
        found.append(gain[drawn].sum(1) / size[drawn].sum(1))
    return np.concatenate(found)


def _sign_flip(gain: np.ndarray, seed: int) -> float:
    """Two-sided p value: how often clusters whose gains had random signs would differ as much."""
    rng, gain = np.random.default_rng(seed), gain[gain != 0]
    as_much = 0
    for _ in range(RESAMPLES // _CHUNK):
        signs = rng.integers(2, size=(_CHUNK, len(gain))) * 2 - 1
        as_much += int((np.abs(signs @ gain) >= abs(gain.sum())).sum())
    return (as_much + 1) / (RESAMPLES + 1)
