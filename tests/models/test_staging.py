"""A directory is replaced whole, and neither the new nor the earlier one is lost, whatever fails in between."""

import os

import pytest

from latent_jax.models import staging


def made(path, text):
    path.mkdir()
    (path / "file").write_text(text)
    return path


def replace(path):
    with staging.staged(path) as partial:
        (partial / "file").write_text("new")


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_a_rename_that_fails_leaves_the_earlier_one(tmp_path, monkeypatch, failing):
    made(tmp_path / "out", "earlier")
    calls, rename = [], os.rename

    def fail(*names):
        calls.append(names)
        if len(calls) == failing:
            raise OSError(28, "No space left on device", str(names[1]))
        rename(*names)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="No space left"):
        replace(tmp_path / "out")
    assert (tmp_path / "out" / "file").read_text() == "earlier"
    assert os.listdir(tmp_path) == ["out"]


def test_where_every_rename_fails_from_one_on_nothing_is_lost(tmp_path, monkeypatch):
    made(tmp_path / "out", "earlier")
    rename, calls = os.rename, []

    def fail(*names):
        calls.append(names)
        if len(calls) > 2:
            raise OSError(30, "Read-only file system", str(names[1]))
        rename(*names)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="Read-only"):
        replace(tmp_path / "out")
    monkeypatch.undo()
    assert {(entry / "file").read_text() for entry in tmp_path.iterdir()} == {"earlier", "new"}
    staging.recover(tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"] and (tmp_path / "out" / "file").read_text() == "new"


@pytest.mark.parametrize(
    "left, stands",
    [
        ({".out.partial": "half", "out": "earlier"}, "earlier"),
        ({".out.new": "new", "out": "earlier"}, "earlier"),
        ({".out.new": "new", ".out.old": "earlier"}, "new"),
        ({".out.old": "earlier", "out": "new"}, "new"),
        ({".out.old": "earlier", ".out.partial": "half"}, "earlier"),
    ],
)
def test_what_a_kill_leaves_is_recovered(tmp_path, left, stands):
    for name, text in left.items():
        made(tmp_path / name, text)
    staging.recover(tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"] and (tmp_path / "out" / "file").read_text() == stands
