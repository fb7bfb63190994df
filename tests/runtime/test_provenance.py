"""Versions and commit: true where they can be known, None where not."""

import os
import subprocess
import sys

import jax

from latent_jax.runtime import provenance


def git(directory, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    ended = subprocess.run(["git", *identity, *arguments], cwd=directory, capture_output=True, text=True, check=True)
    return ended.stdout.strip()


def checkout(tmp_path, monkeypatch):
    """A repository in which this module seems to lie."""
    module = tmp_path / "latent_jax" / "runtime" / "provenance.py"
    module.parent.mkdir(parents=True)
    module.write_text("")
    monkeypatch.setattr(provenance, "__file__", str(module))
    return module


def test_versions():
    found = provenance.versions()
    assert found["jax"] == jax.__version__ and found["python"] == sys.version.split()[0]


def test_commit_with_a_mark_for_changed_files(tmp_path, monkeypatch):
    module = checkout(tmp_path, monkeypatch)
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message=first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert provenance.git_commit() == commit
    (tmp_path / "untracked").write_text("")
    assert provenance.git_commit() == commit
    module.write_text("changed")
    assert provenance.git_commit() == commit + "+"


def test_changed_files_alone_are_another_commit(monkeypatch):
    monkeypatch.setattr(provenance, "git_commit", lambda: "0123456789abcdef+")
    (line,) = provenance.changes({"git_commit": "0123456789abcdef"})
    assert "commit 0123456789ab -> 0123456789ab+;" in line


def test_no_commit_outside_a_checkout(tmp_path, monkeypatch):
    checkout(tmp_path / "site-packages", monkeypatch)
    git(tmp_path, "init", "--quiet")
    assert provenance.git_commit() is None


def test_no_commit_without_git(tmp_path, monkeypatch):
    checkout(tmp_path, monkeypatch)
    git(tmp_path, "init", "--quiet")
    monkeypatch.setenv("PATH", "")
    assert provenance.git_commit() is None


def test_a_run_writes_nothing_into_the_repository(tmp_path):
    """`git status` rewrites an index whose times are old; ended there, it left a lock that stopped every commit."""
    git(tmp_path, "init", "-q")
    file = tmp_path / "a"
    file.write_text("a")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-qm", "a")
    index = tmp_path / ".git" / "index"
    before = index.read_bytes()
    os.utime(file, (1, 1))
    assert provenance._git(tmp_path, "status", "--porcelain", "--untracked-files=no") == ""
    assert index.read_bytes() == before
