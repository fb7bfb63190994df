"""Files that are whole or absent."""

import os

import pytest

from latent_jax.errors import UserError
from latent_jax.runtime import files


def test_write_replaces_and_makes_directories(tmp_path):
    path = tmp_path / "a" / "b.json"
    files.write_text(path, "one")
    files.write_text(path, "two")
    assert path.read_text() == "two"
    assert [one.name for one in path.parent.iterdir()] == ["b.json"]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "b.json"
    files.write_text(path, "one")
    monkeypatch.setattr(os, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        files.write_text(path, "two")
    assert path.read_text() == "one"
    assert [one.name for one in tmp_path.iterdir()] == ["b.json"]


def test_the_mode_is_that_of_any_new_file(tmp_path):
    (tmp_path / "plain").write_text("")
    files.write_text(tmp_path / "ours", "")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_name_is_as_long_as_the_file_system_allows_and_errors_name_the_file_that_was_asked_for(tmp_path):
    path = tmp_path / ("\N{HIRAGANA LETTER A}" * 85)  # 255 bytes
    files.write_text(path, "one")
    assert os.listdir(tmp_path) == [path.name]
    path = tmp_path / "directory"
    path.mkdir()
    with pytest.raises(IsADirectoryError) as problem:
        files.write_text(path, "")
    assert problem.value.filename == str(path)


def test_json_is_read_strictly_and_what_is_wrong_names_the_file(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert files.read_json(path) == {"a": 1}
    for content, said in (
        (b"\xff\x00", "cannot be read as JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b"{", "cannot be read as JSON"),
        (b"[1]", "expected a JSON object, got a list"),
        (b"", "cannot be read as JSON"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=said) as problem:
            files.read_json(path)
        assert str(problem.value).startswith(f"{path}: ")
    with pytest.raises(UserError, match="expected at most 3"):
        path.write_bytes(b"1234")
        files.read_json(path, most=3)


def test_what_is_no_regular_file_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("fifo", "zero", "."):
        with pytest.raises(UserError, match="not a regular file|Is a directory") as problem:
            files.read_bytes(tmp_path / name)
        assert str(problem.value).startswith(f"{tmp_path / name}: ")
    for name in ("absent", "x" * 5000, "nul\0"):
        with pytest.raises(UserError):
            files.read_bytes(tmp_path / name)


def test_a_user_without_a_home_has_a_cache_of_its_own(monkeypatch):
    def unknown():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("LATENT_JAX_CACHE", raising=False)
    monkeypatch.setattr(files.Path, "home", staticmethod(unknown))
    assert files.cache_directory().name == f"latent_jax-{os.getuid()}"


def test_an_error_of_an_open_file_gets_its_name(tmp_path):
    with pytest.raises(OSError) as problem, files.naming(tmp_path / "log"):
        raise OSError(28, "No space left on device")
    assert problem.value.filename == str(tmp_path / "log")


def test_what_was_written_when_a_process_died_is_cleared(tmp_path):
    (tmp_path / ".a.json.x1.partial").touch()
    (tmp_path / "b.partial").touch()
    (tmp_path / ".c.partial").mkdir()
    files.clear_partial(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"b.partial", ".c.partial"}


def test_a_file_beyond_all_use_is_not_read(tmp_path):
    """A disk that lost a block may give a file of any size, all zeros."""
    file = tmp_path / "metrics.jsonl"
    file.touch()
    os.truncate(file, 2**32)
    with pytest.raises(UserError, match=r"metrics\.jsonl: 4,294,967,296 bytes, expected at most 1,073,741,824"):
        files.read_bytes(file)
