"""Kills commands at random moments, runs them again, and compares with a run that was left alone.

    python -m tests.faults.kills --count=100 [--first=0] [--commands=train,export] [--jobs=2] [--base=DIR] [--table]

SIGKILL goes to the command's process group at a moment drawn evenly over the time that the undisturbed command took.
After the second run the results must be equal (metrics without timings, weights, files, replies), and the folders must
hold what the undisturbed ones hold, the one for temporary files included. Exit status 1 where one of these fails.
"""

import dataclasses
import json
import random
import re
import shutil
import sys
from pathlib import Path

from tests.faults import driver, trial, warm
from tests.faults import subjects as given
from tests.faults.driver import Result
from tests.faults.subjects import Subject

# Names that hold a time or are drawn by a library.
_DRAWN = ((re.compile(r"events\.out\.tfevents\.[^/]*"), "events"), (re.compile(r"[0-9a-f]{32}"), "#"))
TRIES = 5  # until a command does not finish before its kill


def commands() -> dict[str, Subject]:
    """What is killed. `injured` is unused here."""
    known = given.subjects()
    train, cached, raw = known["resume"], known["cache"], known["raw_gqa"]
    return {
        "train": dataclasses.replace(train, build=given.link_data),
        "cache": dataclasses.replace(
            cached, build=given.link_data, results=lambda place: [given.trained(place), digests(place / "cache")]
        ),
        "prepare": dataclasses.replace(raw, results=lambda place: digests(place / "out")),
        "evaluate": dataclasses.replace(known["evaluated_model"]),
        "convert": known["convert_run"],
        "export": dataclasses.replace(train, build=without_export),
    }


def without_export(base: Path, place: Path) -> None:
    """A run after its last step: only the export and the report are left."""
    given.workdir(base, place)
    given.unfinish(place)


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(file.relative_to(folder)): given.file_digest(file) for file in files}


def tree(home: Path) -> list[str]:
    """Every path below the place and the temporary folder, drawn names made equal."""
    found = set()
    for path in (*(home / "place").rglob("*"), *(home / "tmp").rglob("*")):
        name = str(path.relative_to(home))
        for pattern, stand_in in _DRAWN:
            name = pattern.sub(stand_in, name)
        found.add(name)
    return sorted(found)


def ready(base: Path, name: str) -> Path:
    return base / "kills" / name / "expected.json"


def build(base: Path, name: str) -> int:
    """What the trials copy; the results, the tree and the seconds of the undisturbed command."""
    subject, home = commands()[name], base / "kills" / name
    shutil.rmtree(home, ignore_errors=True)
    (home / "given" / "place").mkdir(parents=True)
    subject.build(base, home / "given" / "place")
    shutil.copytree(home / "given" / "place", home / "undisturbed" / "place", symlinks=True)
    said = driver.undisturbed(name, subject.command, home / "undisturbed" / "place", trial.LIMIT * 3)
    expected = {"results": subject.results(home / "undisturbed" / "place"), "tree": tree(home / "undisturbed")}
    driver.write_expected(ready(base, name), {**expected, "seconds": said.seconds})
    return 0


def kill(base: Path, name: str, seed: int) -> Result:
    """One kill and what the same command made of it. The folder stays where that is not good."""
    subject, home = commands()[name], base / "kills" / name
    expected = json.loads(ready(base, name).read_text())
    draw, span = random.Random(f"{name} {seed}"), expected["seconds"]
    this = home / f"trial_{seed}"
    for _ in range(TRIES):
        shutil.rmtree(this, ignore_errors=True)
        shutil.copytree(home / "given" / "place", this / "place", symlinks=True)
        after = draw.uniform(0, span)
        said = warm.run(*subject.command, this / "place", trial.LIMIT, kill_after=after)
        if not (first := said.status == 0):
            said = warm.run(*subject.command, this / "place", trial.LIMIT)
            break
        span = said.seconds  # the machine is less busy than when the undisturbed command ran
    outcome, told = judge(subject, this, expected, said)
    outcome = "finished first" if first and outcome == "equal" else outcome
    result = Result(seed, name, f"killed after {after:.2f} s", outcome, told, said.seconds)
    if result.good:
        shutil.rmtree(this)
    return result


def judge(subject: Subject, home: Path, expected: dict, said: warm.Said) -> tuple[str, str]:
    last = ([line for line in said.err.splitlines() if line.strip()] or [""])[-1][:300]
    # Killed between the rename and the process's end: what was asked for is there, and the tool says so.
    if said.hung or (said.status != 0 and "already there" not in last):
        return "hang" if said.hung else "fails", f"status {said.status}: {last}"
    found = json.loads(json.dumps(subject.results(home / "place")))
    if found != expected["results"]:
        return "differs", trial.differs(expected["results"], found)
    here = tree(home)
    if extra := sorted(set(here) ^ set(expected["tree"])):
        left = [name for name in extra if name in here]
        return ("left behind" if left else "missing"), ", ".join(left or extra)[:300]
    return "equal", last


DRIVER = driver.Driver(
    program="tests.faults.kills",
    about=__doc__.splitlines()[0],
    unit="kills",
    count_flag="--count",
    names_flag="--commands",
    known=lambda: list(commands()),
    ready=ready,
    build=build,
    trial=kill,
)

if __name__ == "__main__":
    sys.exit(DRIVER.main())
