"""One trial: a copy of a subject, one file of it injured as the seed says, the command, the judgement."""

import json
import random
import shutil
from pathlib import Path

from tests.faults import driver, warm
from tests.faults.driver import Result
from tests.faults.inject import injure
from tests.faults.subjects import Subject, subjects

LIMIT = 120.0  # seconds of a command that takes a few
MEMORY = 2 * 2**30  # resident bytes beyond those of the undisturbed command
# What a run writes for people and other programs and never reads back.
UNREAD = {"hf", "parameters.txt", "imagination.json", "curves.png", "neighbours.png", ".lock"}


def ready(base: Path, name: str) -> Path:
    return base / "given" / name / "expected.json"


def build(base: Path, name: str) -> int:
    """Writes what the trials of a subject copy, and what the undisturbed command makes of it."""
    subject, home, trial = subjects()[name], base / "given" / name, base / "undisturbed" / name
    for stale in (home, trial):
        shutil.rmtree(stale, ignore_errors=True)
    place = home / "place"
    place.mkdir(parents=True)
    subject.build(base, place)
    shutil.copytree(place, trial / "place", symlinks=True)
    said = driver.undisturbed(name, subject.command, trial / "place", LIMIT * 3)
    expected = {"results": subject.results(trial / "place"), "seconds": said.seconds, "peak": said.peak}
    driver.write_expected(ready(base, name), expected)
    return 0


def run(base: Path, name: str, seed: int) -> Result:
    """The trial of a seed. Its folder stays where the outcome is not good."""
    subject, draw = subjects()[name], random.Random(f"{name} {seed}")
    trial = base / "trials" / f"{name}_{seed}"
    shutil.rmtree(trial, ignore_errors=True)
    place = trial / "place"
    shutil.copytree(base / "given" / name / "place", place, symlinks=True)
    files = injurable(place / subject.injured)
    file = draw.choice(files)
    injury = injure(file, draw, like(file, files))
    expected = json.loads(ready(base, name).read_text())
    module, arguments = subject.command
    said = warm.run(module, arguments, place, LIMIT)
    outcome, why = judge(subject, place, file, expected, said)
    result = Result(seed, name, f"{file.relative_to(place)}: {injury}", outcome, why, said.seconds)
    if result.good:
        shutil.rmtree(trial)
    return result


def injurable(under: Path) -> list[Path]:
    files = sorted(path for path in under.rglob("*") if path.is_file() and not path.name.startswith("events.out"))
    return [path for path in files if not UNREAD & {path.name, path.relative_to(under).parts[0]}]


def like(file: Path, files: list[Path]) -> list[Path]:
    """Files of the same name elsewhere, else of the same ending, that hold something else."""
    content = file.read_bytes()
    others = [other for other in files if other.name == file.name and other.read_bytes() != content]
    alike = [other for other in files if file.suffix and other.suffix == file.suffix and other.read_bytes() != content]
    return others or alike


def judge(subject: Subject, place: Path, file: Path, expected: dict, said: warm.Said) -> tuple[str, str]:
    """(outcome, what was said or what differs)."""
    lines = [line for line in said.err.splitlines() if line.strip()]
    last = lines[-1][:300] if lines else ""
    if said.hung:
        return "hang", last
    if "Traceback" in said.err or "Traceback" in said.out:
        return "traceback", last
    if said.peak > expected["peak"] + MEMORY:
        return "memory", f"{said.peak / 2**30:.1f} GiB, undisturbed {expected['peak'] / 2**30:.1f}; {last}"
    if said.status != 0:
        clear = said.status > 0 and last.startswith("error: ")
        return ("clear" if clear else "unclear"), f"status {said.status}: {last}"
    try:
        found = json.loads(json.dumps(subject.results(place)))
    except Exception as problem:  # whatever it is, status 0 with results that cannot be read is the fault
        return "silent", f"status 0, but the results cannot be read: {type(problem).__name__}: {str(problem)[:200]}"
    if found == expected["results"]:
        return "equal", last
    if subject.records:
        return judge_records(file, expected["results"], found)
    # Records that training left out change every later batch: nothing else can be compared.
    if subject.injured.startswith("data") and found["metrics"][-1].get("skipped", 0) > 0:
        return "skipped", last
    return "silent", differs(expected["results"], found)


def judge_records(file: Path, expected: dict, found: dict) -> tuple[str, str]:
    """Prepared records of an injured official form. Text and JPEG data bear no checksum: what can be read is another
    valid input and is taken as it stands. An image that is injured may touch its own records alone."""
    skipped = found.pop("")["skipped"] - expected.pop("")["skipped"]
    before = {(split, key): digest for split, records in expected.items() for key, digest in records.items()}
    after = {(split, key): digest for split, records in found.items() for key, digest in records.items()}
    lost, changed = before.keys() - after.keys(), [key for key in after if after[key] != before.get(key)]
    told = f"{skipped} skipped, {len(lost)} lost, {len(changed)} changed or new of {len(before)}"
    image = file.suffix in (".jpg", ".png")
    # No list names these forms' shards or lists of questions: without one of them it is another, smaller folder.
    if not image and not file.exists() and not changed:
        return "as it stands", told
    if lost and not skipped and (image or not changed):
        return "silent", told
    if not changed:
        return "skipped", told
    return ("silent" if image and len(changed) > 1 else "as it stands"), told


def differs(expected, found, where: str = "") -> str:
    """The first place where two JSON documents differ."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for name in [*expected, *(name for name in found if name not in expected)]:
            if name not in found or name not in expected:
                return f"{where}.{name} only {'before' if name in expected else 'now'}"
            if expected[name] != found[name]:
                return differs(expected[name], found[name], f"{where}.{name}")
    if isinstance(expected, list) and isinstance(found, list):
        if len(expected) != len(found):
            return f"{where}: {len(found)} items, undisturbed {len(expected)}"
        for index, (a, b) in enumerate(zip(expected, found, strict=True)):
            if a != b:
                return differs(a, b, f"{where}[{index}]")
    return f"{where}: {str(found)[:80]!r}, undisturbed {str(expected)[:80]!r}"
