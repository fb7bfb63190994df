"""Preparing in parts: what was finished is not done again, what was not is, and the bytes are the same either way."""

import fcntl
import itertools
import os
import signal
import subprocess
import sys
import threading

import pytest
from data.builders.official import coco_folder, records, run, samples, write_tar

from latent_jax.data.builders import coco_captions, parts, webdataset
from latent_jax.data.builders.build import build
from latent_jax.data.builders.tally import Tally


@pytest.fixture
def reads(monkeypatch):
    """Names of the images that were read."""
    names, read = [], coco_captions.read_image

    def counted(file):
        names.append(file.name)
        return read(file)

    monkeypatch.setattr(parts, "SIZE", 8)
    monkeypatch.setattr(coco_captions, "read_image", counted)
    return names


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*.array_record*"))}


def hidden(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def killed(raw, output, after):
    """The command, killed without warning in the middle of its `after`-th image."""
    program = f"""
import os, signal, sys
from latent_jax import prepare
from latent_jax.data.builders import coco_captions, parts
read, count = coco_captions.read_image, 0
def deadly(file):
    global count
    count += 1
    if count == {after}:
        os.kill(os.getpid(), signal.SIGKILL)
    return read(file)
parts.SIZE, coco_captions.read_image = 8, deadly
sys.exit(prepare.main(["--dataset=coco_captions", "--raw={raw}", "--output={output}", "--workers=1"]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_a_killed_run_goes_on(tmp_path, reads, capsys):
    raw = tmp_path / "raw"
    coco_folder(raw)
    killed(raw, tmp_path / "out", after=21)
    assert hidden(tmp_path / "out") == [".coco_captions.prepare"] == os.listdir(tmp_path / "out")

    status, _ = run(capsys, "coco_captions", raw, tmp_path / "out")
    assert status == 0 and os.listdir(tmp_path / "out") == ["coco_captions"]
    assert len(reads) == 40 - 16  # two parts of eight were finished
    assert list(records("coco_captions", tmp_path / "out", "train")) == [str(9 + i) for i in range(40)]
    build("coco_captions", raw, tmp_path / "whole")
    assert content(tmp_path / "out") == content(tmp_path / "whole") and len(content(tmp_path / "out")) == 5


def test_a_part_that_a_crash_left_short_is_made_again(tmp_path, reads, capsys):
    raw = tmp_path / "raw"
    coco_folder(raw)
    killed(raw, tmp_path / "out", after=21)
    work = tmp_path / "out" / ".coco_captions.prepare" / "parts" / "coco_captions" / "train"
    record = work / "00000.array_record"
    record.write_bytes(record.read_bytes()[:-100])
    (work / "00001.json").write_text("")
    assert run(capsys, "coco_captions", raw, tmp_path / "out")[0] == 0
    assert len(reads) == 40 and len(records("coco_captions", tmp_path / "out", "train")) == 40


def test_a_finished_part_is_made_again_when_its_files_change(tmp_path, reads, capsys):
    raw = tmp_path / "raw"
    coco_folder(raw)
    killed(raw, tmp_path / "out", after=21)
    os.utime(raw / "annotations" / "captions_train2017.json", (1, 1))
    status, _ = run(capsys, "coco_captions", raw, tmp_path / "out")
    assert status == 0 and len(reads) == 40


def test_as_many_threads_as_one_likes(tmp_path, reads):
    raw = tmp_path / "raw"
    coco_folder(raw)
    (raw / "train2017" / "000000000012.jpg").unlink()
    lines = {workers: build("coco_captions", raw, tmp_path / str(workers), workers=workers) for workers in (1, 2, 7)}
    assert lines[1] == lines[2] == lines[7] and "skipped 1 of 40 images" in lines[1][0]
    assert content(tmp_path / "1") == content(tmp_path / "2") == content(tmp_path / "7")
    skipped = [next((tmp_path / name).rglob("skipped.jsonl")).read_bytes() for name in "127"]
    assert skipped[0] == skipped[1] == skipped[2]


def test_too_many_bad_then_mended_or_allowed(tmp_path, reads, capsys):
    raw = tmp_path / "raw"
    coco_folder(raw)
    gone = [raw / "train2017" / f"{9 + i:012}.jpg" for i in (0, 1, 20)]
    saved = {file: file.read_bytes() for file in gone}
    for file in gone:
        file.unlink()
    assert run(capsys, "coco_captions", raw, tmp_path / "out")[0] == 2
    for file, data in saved.items():
        file.write_bytes(data)
    reads.clear()
    status, err = run(capsys, "coco_captions", raw, tmp_path / "out")
    assert status == 0 and ": skipped" not in err and len(reads) == 16  # the two parts that had lost something
    assert len(records("coco_captions", tmp_path / "out", "train")) == 40

    for file in gone:
        file.unlink()
    assert run(capsys, "coco_captions", raw, tmp_path / "allowed")[0] == 2
    reads.clear()
    status, err = run(capsys, "coco_captions", raw, tmp_path / "allowed", "--max_bad=0.1")
    assert status == 0 and "skipped 3 of 40 images" in err and not reads  # everything was kept


def test_a_failure_in_one_part_stops_the_others(tmp_path, monkeypatch):
    raw = tmp_path / "raw"
    coco_folder(raw)
    monkeypatch.setattr(parts, "SIZE", 8)
    seen = []

    def breaks(file):
        seen.append(file)
        raise RuntimeError("the disk is gone")

    monkeypatch.setattr(coco_captions, "read_image", breaks)
    with pytest.raises(RuntimeError, match="the disk is gone"):
        build("coco_captions", raw, tmp_path / "out", workers=1)
    assert len(seen) == 1 and not list((tmp_path / "out").iterdir())


def test_parts_under_way_stop_and_others_do_not_begin(tmp_path):
    """The first failure is what is raised, though parts that were stopped may end before the one that failed."""
    begun, under_way = [], threading.Barrier(3)

    def read(part, tally):
        begun.append(part.place)
        under_way.wait(60)
        if part.place == 2:
            raise RuntimeError("the disk is gone")
        for number in itertools.count():
            yield parts.Record(f"{part.place} {number}", b"record")

    several = [parts.Part(place, (), f"part {place}") for place in range(20)]
    tally = Tally("train")
    with pytest.raises(RuntimeError, match="the disk is gone"):
        parts.write(tmp_path, several, read, tally, noun="images", title="train", workers=3)
    assert sorted(begun) == [0, 1, 2] and not list(tmp_path.glob("*.json"))


def test_two_processes_do_not_share_a_work_folder(tmp_path, capsys):
    coco_folder(tmp_path / "raw", 3)
    work = tmp_path / "out" / ".coco_captions.prepare"
    work.mkdir(parents=True)
    with (work / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        status, err = run(capsys, "coco_captions", tmp_path / "raw", tmp_path / "out")
        assert status == 2 and "another process prepares this dataset here" in err
    assert run(capsys, "coco_captions", tmp_path / "raw", tmp_path / "out")[0] == 0
    status, err = run(capsys, "coco_captions", tmp_path / "raw", tmp_path / "more", "--workers=0")
    assert status == 2 and "--workers=0: expected at least 1" in err


def test_repeated_keys_survive_a_resume(tmp_path, capsys, monkeypatch):
    """The part that repeats an earlier one's keys is made without them, once; a resume finds it as it should be."""
    raw = tmp_path / "raw"
    for number, start in enumerate((0, 3, 20)):
        write_tar(raw / f"{number:05}.tar", samples(start, 6))
    assert run(capsys, "laion", raw, tmp_path / "failed", "--max_bad=0.1")[0] == 2
    monkeypatch.setattr(webdataset, "examples", None)  # nothing is read again
    status, err = run(capsys, "laion", raw, tmp_path / "failed", "--max_bad=0.5")
    assert status == 0 and "skipped 3 of 18 images" in err
    assert [int(key) for key in records("laion", tmp_path / "failed", "train")] == [*range(9), *range(20, 26)]
