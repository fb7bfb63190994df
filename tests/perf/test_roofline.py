"""Bounds on a step's time, by hand."""

import pytest

from latent_jax.perf import hlo, topologies
from latent_jax.perf.roofline import roofline

GIGABYTE = 10**9


def collective(kind, size, ids, times=1.0):
    return hlo.Collective(kind, size, times, 1, len(ids), tuple(ids), "")


def test_one_host():
    moved = [
        collective("all-gather", 8 * GIGABYTE, range(8), times=3),
        collective("all-reduce", 8 * GIGABYTE, range(8)),
        collective("collective-permute", 2 * GIGABYTE, (0, 1)),
    ]
    found = roofline(topologies.parse("a100-80gb:8"), 312e12 * 2, 2.039e12 * 3, moved)
    assert (found.matmuls, found.memory, found.network) == (2, 3, 0)
    assert found.links == pytest.approx((3 * 7 + 2 * 7 + 2) / 300)
    assert found.hidden == 3 and found.exposed == pytest.approx(3 + found.links)


def test_between_hosts_every_host_receives_what_it_has_not():
    """16 GB over 2 hosts: 8 GB enter each, through 8 adapters of 25 GB/s; a sum enters twice."""
    target = topologies.parse("a100-80gb:2x8")
    gathered = roofline(target, 0, 0, [collective("all-gather", 16 * GIGABYTE, range(16))])
    assert gathered.network == pytest.approx(8 / 8 / 25) and gathered.links == pytest.approx(15 / 300)
    summed = roofline(target, 0, 0, [collective("all-reduce", 16 * GIGABYTE, range(16))])
    assert summed.network == pytest.approx(2 * gathered.network)
    inside = roofline(target, 0, 0, [collective("all-gather", 16 * GIGABYTE, range(8, 16))])
    assert inside.network == 0
    pairs = roofline(target, 0, 0, [collective("all-reduce", GIGABYTE, (3, 11))])  # replicas, one a host
    assert pairs.network == pytest.approx(2 * 0.5 / 25)
