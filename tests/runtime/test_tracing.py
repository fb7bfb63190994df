"""A trace of some steps: which ones, and that it ends whatever ends the run."""

from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import pytest

from latent_jax.config import schema
from latent_jax.config.training import profiled
from latent_jax.errors import UserError
from latent_jax.runtime.tracing import Tracing


def traced(monkeypatch, steps: range, first: int, last: int) -> list[str]:
    """What is begun and ended over a run of these steps."""
    seen = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda directory: seen.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: seen.append("stop"))
    with Tracing(steps, Path("there")) as trace:
        for step in range(first, last + 1):
            trace.before(step)
            seen.append(step)
            trace.after(step, mock.sentinel.nothing)
    return seen


def test_the_steps_that_are_named_are_traced_and_no_other(monkeypatch):
    monkeypatch.setattr(jax, "block_until_ready", lambda results: results)
    assert traced(monkeypatch, range(2, 4), 1, 4) == [1, "start", 2, 3, "stop", 4]
    assert traced(monkeypatch, range(0), 1, 2) == [1, 2]
    assert traced(monkeypatch, range(2, 9), 3, 4) == ["start", 3, 4, "stop"]  # resumed, and ended before the last
    assert traced(monkeypatch, range(2, 4), 5, 5) == [5]


def test_it_leaves_a_file(tmp_path):
    with Tracing(profiled("1:1"), tmp_path / "profile") as trace:
        trace.before(1)
        trace.after(1, jnp.ones(3) + 1)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


@pytest.mark.parametrize("text", ["3", "3:2", "0:2", "a:b", "1:2:3", "-1:2", "1: 2"])
def test_what_names_no_steps_is_told(text):
    config = schema.default()
    config.log.profile = text
    with pytest.raises(UserError, match="config.log.profile: got .*, expected FIRST:LAST"):
        schema.resolve(config)


def test_steps_are_counted_from_one():
    assert profiled("10:12") == range(10, 13) and not profiled("")
