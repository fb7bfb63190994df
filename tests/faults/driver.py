"""What the programs that injure and kill share: seeds over subjects and processes, outcomes that are kept, a table.

With --base an interrupted run goes on: what a seed came to is kept below BASE/CODE/, where CODE stands for the source
and the versions of the libraries, so that outcomes of different code are never counted together.
"""

import argparse
import collections
import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from tests.faults import warm

GOOD = ("equal", "clear", "skipped", "as it stands", "finished first")
_SOURCES = ("latent_jax", "configs", "tests/faults", "tests/data/builders")


@dataclasses.dataclass(frozen=True)
class Result:
    """What a trial of `subject` came to. done: what was injured, or when it was killed; outcome: one of GOOD, or what
    is wrong; said: the command's last line, or what differs."""

    seed: int
    subject: str
    done: str
    outcome: str
    said: str
    seconds: float

    @property
    def good(self) -> bool:
        return self.outcome in GOOD

    def line(self) -> str:
        told = f"{self.outcome}: seed {self.seed}, {self.subject}, {self.done}; {self.seconds:.1f} s; {self.said}"
        return told if self.good else f"BAD {told}"


@dataclasses.dataclass(frozen=True)
class Driver:
    """One program. unit: its trials' name; known: -> names of subjects; ready: (base, name) -> a file that stands where
    `build` (base, name) is done; trial: (base, name, seed) -> Result. known, build and trial import what they need: the
    package is imported after the environment is set."""

    program: str
    about: str
    unit: str
    count_flag: str
    names_flag: str
    known: Callable[[], Sequence[str]]
    ready: Callable[[Path, str], Path]
    build: Callable[[Path, str], int]
    trial: Callable[[Path, str, int], Result]

    def main(self) -> int:
        options = self._options()
        root = (options.base or Path(tempfile.mkdtemp(prefix="faults_"))).absolute()
        base = root / code()
        begin(root / "cache", base)
        known = self.known()
        chosen = options.names.split(",") if options.names else list(known)
        if unknown := [name for name in chosen if name not in known]:
            raise SystemExit(f"error: {self.names_flag}: no {unknown[0]}; expected some of {', '.join(known)}")
        seeds = range(options.first, options.first + options.count)
        names = {seed: chosen[seed % len(chosen)] for seed in seeds}
        results = self._kept(base, names)
        left = {seed: name for seed, name in names.items() if seed not in results}
        began = time.monotonic()
        absent = [name for name in dict.fromkeys(left.values()) if not self.ready(base, name).exists()]
        must(spread([(name, lambda name=name: self.build(base, name)) for name in absent], options.jobs))
        built = time.monotonic()
        for result in self._run(base, left, options.jobs):
            results[result.seed] = result
            if options.list or not result.good:
                print(result.line(), flush=True)
        rate = len(left) / max(time.monotonic() - built, 1e-9) * 60
        bad = [result for _, result in sorted(results.items()) if not result.good]
        print("\n".join(table(results.values(), markdown=options.table)))
        print(
            f"{len(seeds)} {self.unit}, {len(bad)} bad; {len(seeds) - len(left)} were done before, the others "
            f"{rate:.1f} a minute after {built - began:.0f} s for what they copy"
        )
        for result in bad:
            print(result.line())
        if not options.base and not bad:
            shutil.rmtree(root)
        elif bad:
            print(f"the folders of the bad ones are kept in {base}")
        return int(bool(bad))

    def _options(self) -> argparse.Namespace:
        parser = argparse.ArgumentParser(prog=f"python -m {self.program}", description=self.about)
        parser.add_argument(self.count_flag, dest="count", type=int, default=100)
        parser.add_argument("--first", type=int, default=0, help="the first seed")
        parser.add_argument(self.names_flag, dest="names", default="", help="comma-separated; default: all, in turn")
        parser.add_argument("--jobs", type=int, default=os.cpu_count())
        parser.add_argument("--base", type=Path, help="where to work and to go on; default: a temporary folder")
        parser.add_argument("--list", action="store_true", help="a line for every trial, not for bad ones alone")
        parser.add_argument("--table", action="store_true", help="the table at the end as Markdown")
        return parser.parse_args()

    def _outcome(self, base: Path, name: str, seed: int) -> Path:
        return base / "outcomes" / f"{self.unit}_{name}_{seed}.json"

    def _kept(self, base: Path, names: dict[int, str]) -> dict[int, Result]:
        files = {seed: self._outcome(base, name, seed) for seed, name in names.items()}
        return {seed: Result(**json.loads(file.read_text())) for seed, file in files.items() if file.exists()}

    def _run(self, base: Path, names: dict[int, str], jobs: int) -> Iterable[Result]:
        (base / "outcomes").mkdir(exist_ok=True)

        def work(name: str, seed: int) -> int:
            file = self._outcome(base, name, seed)
            temporary = file.with_suffix(".part")
            temporary.write_text(json.dumps(dataclasses.asdict(self.trial(base, name, seed))))
            temporary.rename(file)
            return 0

        works = ((seed, lambda name=name, seed=seed: work(name, seed)) for seed, name in names.items())
        for seed, status in spread(works, jobs):
            if status:
                yield Result(seed, names[seed], f"status {status}", "broken trial", "", 0.0)
            else:
                yield self._kept(base, {seed: names[seed]})[seed]


def code() -> str:
    """Twelve digits for the source that runs, and what it runs on."""
    from latent_jax.runtime import provenance

    found = hashlib.sha256(repr(provenance.versions()).encode())
    for folder in _SOURCES:
        for file in sorted((warm.REPOSITORY / folder).rglob("*")):
            if file.is_file() and "__pycache__" not in file.parts:
                found.update(f"{file.relative_to(warm.REPOSITORY)}\0".encode() + file.read_bytes())
    return found.hexdigest()[:12]


def begin(cache: Path, base: Path) -> None:
    """Imports, and the prepared data that subjects share."""
    base.mkdir(parents=True, exist_ok=True)
    warm.prepare_process(cache)
    from tests.faults import subjects

    if not (base / "data.made").exists():
        shutil.rmtree(base / "data", ignore_errors=True)
        must(spread([("data", lambda: subjects.make_data(base))], 1))
        (base / "data.made").touch()


def spread(works: Iterable[tuple[object, Callable[[], int]]], jobs: int) -> Iterable[tuple[object, int]]:
    """Does (name, work) pairs in forked children, `jobs` at a time; yields (name, exit status) as they end."""
    running = {}
    for name, work in works:
        running[warm.fork(work)] = name
        if len(running) >= jobs:
            yield _ended(running)
    while running:
        yield _ended(running)


def _ended(running: dict[int, object]) -> tuple[object, int]:
    child, status = os.wait()
    return running.pop(child), os.waitstatus_to_exitcode(status)


def must(ended: Iterable[tuple[object, int]]) -> None:
    for name, status in ended:
        if status:
            raise SystemExit(f"error: {name} could not be made")


def write_expected(file: Path, expected: dict) -> None:
    """Last of what `build` writes, and whole: it says that the rest is there."""
    temporary = file.with_suffix(".part")
    temporary.write_text(json.dumps(expected))
    temporary.rename(file)


def undisturbed(name: str, command: tuple[str, list[str]], place: Path, limit: float) -> warm.Said:
    """The command on what nobody touched. Raises RuntimeError where it fails."""
    said = warm.run(*command, place, limit)
    if said.status != 0:
        raise RuntimeError(f"{name}: undisturbed, status {said.status}\n{said.err[-2000:]}")
    return said


def table(results: Iterable[Result], markdown: bool = False) -> list[str]:
    """A row for each subject, a column for each outcome, and the sum."""
    counts = collections.defaultdict(collections.Counter)
    for result in results:
        counts[result.subject][result.outcome] += 1
        counts["all"][result.outcome] += 1
    counts["all"] = counts.pop("all", collections.Counter())  # the last row
    outcomes = sorted(counts["all"], key=lambda outcome: (outcome not in GOOD, outcome))
    rows = [["", *outcomes], *([name, *(str(row[o] or "") for o in outcomes)] for name, row in counts.items())]
    if markdown:
        lines = [f"| {' | '.join(row)} |" for row in rows]
        return [lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
