"""One writer a directory."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from latent_jax.errors import UserError
from latent_jax.runtime import lock

HOLD = """
import sys, time
from latent_jax.runtime import lock
with lock.only_writer(sys.argv[1]):
    open(sys.argv[1] + "/.config.json.abc.partial", "w").close()
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_writer_is_refused_by_name_and_a_dead_one_holds_nothing(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=rf"another process writes to it \(process {holder.pid}\)"):
        lock.only_writer(tmp_path).__enter__()
    assert (tmp_path / ".config.json.abc.partial").exists()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with lock.only_writer(tmp_path):
        # What it was writing when it was killed is gone.
        assert os.listdir(tmp_path) == [lock.NAME]


def test_a_new_directory_in_which_nothing_was_begun_does_not_stay(tmp_path):
    with pytest.raises(ZeroDivisionError), lock.only_writer(tmp_path / "a" / "run"):
        raise ZeroDivisionError
    assert not (tmp_path / "a" / "run").exists()
    with lock.only_writer(tmp_path / "run"):
        (tmp_path / "run" / "config.json").touch()
    assert {path.name for path in (tmp_path / "run").iterdir()} == {lock.NAME, "config.json"}


def test_the_same_process_may_come_again(tmp_path):
    for _ in range(2):
        with lock.only_writer(tmp_path):
            pass


def test_what_is_no_directory_is_refused_by_name(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("file", "dangling"):
        with pytest.raises(UserError, match=f"{name}: not a directory"), lock.only_writer(tmp_path / name):
            pass


def test_a_directory_that_is_removed_meanwhile_does_not_hide_what_ended_the_run(tmp_path):
    with pytest.raises(ZeroDivisionError), lock.only_writer(tmp_path / "run"):
        shutil.rmtree(tmp_path / "run")
        raise ZeroDivisionError


def test_the_lock_of_a_directory_that_its_holder_removes_is_not_taken(tmp_path, monkeypatch):
    directory, take = tmp_path / "run", lock.taken

    def late(descriptor):
        # Between opening and locking: whoever held it ends, and takes the new directory along.
        monkeypatch.setattr(lock, "taken", take)
        shutil.rmtree(directory)
        return take(descriptor)

    monkeypatch.setattr(lock, "taken", late)
    with lock.only_writer(directory):
        assert os.listdir(directory) == [lock.NAME]
        with pytest.raises(UserError, match="another process writes to it"):
            lock.only_writer(directory).__enter__()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EBADF])
def test_a_file_system_without_locks_keeps_nobody_out(number, tmp_path, monkeypatch):
    def unknown(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(lock.fcntl, "flock", unknown)
    with lock.only_writer(tmp_path), lock.only_writer(tmp_path):
        pass


def test_what_a_link_in_its_place_points_to_is_not_touched(tmp_path):
    """A link to nowhere was waited for, and the file behind a link was emptied."""
    precious = tmp_path / "precious"
    precious.write_text("kept")
    run = tmp_path / "run"
    run.mkdir()
    for make in (
        lambda place: place.symlink_to(precious),
        lambda place: place.symlink_to(tmp_path / "nowhere" / "lock"),
        lambda place: place.symlink_to(place),
        os.mkfifo,
        Path.mkdir,
    ):
        make(run / lock.NAME)
        with pytest.raises(UserError, match=r"\.lock: not a regular file; remove it"), lock.only_writer(run):
            pass
        (run / lock.NAME).rmdir() if (run / lock.NAME).is_dir() else (run / lock.NAME).unlink()
    assert precious.read_text() == "kept"
