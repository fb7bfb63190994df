"""The injuries, the judge, and a few trials and kills of the real commands."""

import dataclasses
import json
import random
import subprocess
import sys

import pytest

from tests.faults import driver, inject, kills, run, trial, warm
from tests.faults.subjects import Subject

DOCUMENT = {"a": [1, 2.5, {"b": None}], "c": "text"}


def write(file, content):
    file.write_bytes(content)
    return file


@pytest.mark.parametrize("seed", range(40))
def test_an_injury_changes_its_file_and_the_seed_decides_how(tmp_path, seed):
    content = json.dumps(DOCUMENT, indent=1).encode()
    files = [write(tmp_path / name, content) for name in ("a.json", "b.json")]
    told = [inject.injure(file, random.Random(seed)) for file in files]
    found = [file.read_bytes() if file.is_file() else None for file in files]
    assert told[0] == told[1] and found[0] == found[1] != content
    assert {path.name for path in tmp_path.iterdir()} <= {file.name for file in files}


def test_every_mutation_is_drawn(tmp_path):
    other, told = write(tmp_path / "other", b"{}"), set()
    for seed in range(300):
        file = write(tmp_path / f"{seed}.json", b'{"a":\n [1, 2]}')
        told.add(inject.injure(file, random.Random(seed), [other]))
    assert {what.split()[0] for what in told} - {"forbid"} == {
        "flip", "cut", "empty", "zero", "delete", "append", "swap", "duplicate", "line", "drop", "replace", "encode",
        "lines"}  # fmt: skip
    assert {what for what in told if what.startswith("replace")} == {
        "replace by a directory", "replace by a pipe", "replace by a link to nowhere", "replace by a link to itself",
        "replace by itself and zeros, 4 GiB", f"replace by {tmp_path.name}/other"}  # fmt: skip


def test_what_may_stand_in_a_files_place_is_of_its_kind_and_another(tmp_path):
    for name in ("1", "2", "3"):
        (tmp_path / name).mkdir()
    names = ("1/a.json", "2/a.json", "3/b.json", "3/c", "3/.lock")
    files = [write(tmp_path / name, name[:1].encode()) for name in names]
    write(tmp_path / "3" / "a.json", b"1")
    found = trial.injurable(tmp_path)
    assert tmp_path / "3" / ".lock" not in found and len(found) == 5
    assert trial.like(files[0], found) == [files[1]]
    assert trial.like(files[2], found) == [tmp_path / name / "a.json" for name in "123"]
    assert trial.like(files[3], found) == []


def test_an_empty_file_is_injured_too(tmp_path):
    for seed in range(5):
        file = write(tmp_path / f"empty_{seed}", b"")
        assert inject.injure(file, random.Random(seed)).split()[0] in ("delete", "replace") or file.read_bytes()


def said(status=0, err="", **more):
    return warm.Said(status, "", err, 1.0, 10, **more)


def judged(tmp_path, said, results=None, injured="run"):
    subject = Subject(lambda *_: None, ("main", []), injured, lambda place: results)
    return trial.judge(subject, tmp_path, tmp_path / "file", {"results": {"x": [1, 2]}, "peak": 10}, said)[0]


def test_the_judge_accepts_equal_numbers_or_one_clear_line(tmp_path):
    assert judged(tmp_path, said(), {"x": [1, 2]}) == "equal"
    assert judged(tmp_path, said(2, "noise\nerror: file: broken\n")) == "clear"


def test_the_judge_refuses_anything_else(tmp_path):
    assert judged(tmp_path, said(), {"x": [1, 3]}) == "silent"
    assert judged(tmp_path, said(1, "Traceback (most recent call last)\nerror: file\n")) == "traceback"
    assert judged(tmp_path, said(1, "broken\n")) == "unclear"
    assert judged(tmp_path, said(-11, "error: file: broken\n")) == "unclear"
    assert judged(tmp_path, said(-9, hung=True)) == "hang"
    large = warm.Said(0, "", "", 1.0, 10 + trial.MEMORY + 1)
    assert judged(tmp_path, large, {"x": [1, 2]}) == "memory"


def test_records_that_are_left_out_must_be_counted(tmp_path):
    subject = Subject(lambda *_: None, ("prepare", []), "raw", lambda place: found, records=True)

    def outcome(file, after, skipped):
        nonlocal found
        found = {"train": after, "": {"skipped": skipped}}
        expected = {"results": {"train": {"1": "a", "2": "b", "3": "c"}, "": {"skipped": 0}}, "peak": 10}
        return trial.judge(subject, tmp_path, tmp_path / file, expected, said())[0]

    found = {}
    assert outcome("1.jpg", {"2": "b", "3": "c"}, 1) == "skipped"
    assert outcome("1.jpg", {"2": "b", "3": "c"}, 0) == "silent"
    assert outcome("deleted.tar", {"2": "b", "3": "c"}, 0) == "as it stands"
    (tmp_path / "cut.tar").touch()
    assert outcome("cut.tar", {"2": "b", "3": "c"}, 0) == "silent"
    assert outcome("1.jpg", {"1": "other", "2": "b", "3": "c"}, 0) == "as it stands"
    assert outcome("1.jpg", {"1": "other", "2": "other", "3": "c"}, 0) == "silent"


def test_the_first_difference_is_named():
    assert trial.differs({"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}]}) == ".a[1].b: '3', undisturbed '2'"
    assert trial.differs({"a": 1}, {}) == ".a only before"


def test_what_a_kill_leaves_behind_is_seen(tmp_path):
    subject = Subject(lambda *_: None, ("main", []), "", lambda place: 1)
    (tmp_path / "place" / "run").mkdir(parents=True)
    (tmp_path / "tmp").mkdir()
    expected = {"results": 1, "tree": kills.tree(tmp_path)}
    assert kills.judge(subject, tmp_path, expected, said())[0] == "equal"
    (tmp_path / "tmp" / "left").touch()
    assert kills.judge(subject, tmp_path, expected, said()) == ("left behind", "tmp/left")
    assert kills.judge(subject, tmp_path, {**expected, "results": 2}, said())[0] == "differs"


def results(*outcomes):
    return [driver.Result(seed, "ab"[seed % 2], "cut", outcome, "", 1.0) for seed, outcome in enumerate(outcomes)]


def test_the_table_has_a_row_for_each_subject_and_the_sum():
    assert driver.table(results("equal", "silent", "equal"), markdown=True) == [
        "|  | equal | silent |", "|---|---|---|", "| a | 2 |  |", "| b |  | 1 |", "| all | 2 | 1 |"]  # fmt: skip
    assert driver.table(results("clear"))[0].split() == ["clear"]


def test_outcomes_are_kept_for_the_code_they_are_of(tmp_path, monkeypatch):
    (one,) = results("equal")
    file = run.DRIVER._outcome(tmp_path, "a", 0)
    file.parent.mkdir()
    file.write_text(json.dumps(dataclasses.asdict(one)))
    assert run.DRIVER._kept(tmp_path, {0: "a", 1: "b"}) == {0: one}
    assert run.DRIVER._kept(tmp_path, {0: "b"}) == {} == kills.DRIVER._kept(tmp_path, {0: "a"})
    (tmp_path / "latent_jax").mkdir()
    source = write(tmp_path / "latent_jax" / "x.py", b"1")
    monkeypatch.setattr(warm, "REPOSITORY", tmp_path)
    before = driver.code()
    assert driver.code() == before
    source.write_bytes(b"2")
    assert driver.code() != before


def command(*arguments):
    """Alone in its process: what is forked must have one thread."""
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=warm.REPOSITORY, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_injured_files(tmp_path):
    command("tests.faults.run", "--seeds=40", f"--base={tmp_path}")
    assert "40 were done before" in command("tests.faults.run", "--seeds=40", f"--base={tmp_path}")


@pytest.mark.slow
def test_killed_commands(tmp_path):
    command("tests.faults.kills", "--count=12", f"--base={tmp_path}")
