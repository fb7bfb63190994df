"""Injures files and says what the commands make of it.

    python -m tests.faults.run --seeds=500 [--first=0] [--subjects=resume,raw_gqa] [--jobs=2] [--base=DIR] [--list]

A seed names the subject, the file and the injury: the same seed on the same code is the same trial. Exit status 1 where
an outcome is none of: equal numbers, one clear line, skipped and counted, another valid input taken as it stands.
"""

import argparse
import collections
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from tests.faults import warm


def spread(works: Iterable[tuple[str, Callable[[], int]]], jobs: int) -> Iterable[tuple[str, int]]:
    """Does (name, work) pairs in forked children, `jobs` at a time; yields (name, exit status) as they end."""
    running = {}
    for name, work in works:
        running[warm.fork(work)] = name
        if len(running) >= jobs:
            yield _ended(running)
    while running:
        yield _ended(running)


def _ended(running: dict[int, str]) -> tuple[str, int]:
    child, status = os.wait()
    return running.pop(child), os.waitstatus_to_exitcode(status)


def begin(base: Path) -> None:
    """Imports, and the prepared data that subjects share."""
    base.mkdir(parents=True, exist_ok=True)
    warm.prepare_process(base / "cache")
    from tests.faults import subjects

    if not (base / "data").exists():
        must(spread([("data", lambda: subjects.make_data(base))], 1))


def must(ended: Iterable[tuple[str, int]]) -> None:
    for name, status in ended:
        if status:
            raise SystemExit(f"error: {name} could not be made")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.run", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--subjects", default="", help="comma-separated; default: all, in turn")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--base", type=Path, help="where to work; default: a temporary folder, removed at the end")
    parser.add_argument("--list", action="store_true", help="print a line for every trial, not for bad ones alone")
    options = parser.parse_args()
    base = (options.base or Path(tempfile.mkdtemp(prefix="faults_"))).absolute()
    begin(base)
    from tests.faults import subjects, trial

    known = subjects.subjects()
    chosen = options.subjects.split(",") if options.subjects else list(known)
    if unknown := [name for name in chosen if name not in known]:
        parser.error(f"no subject {unknown[0]}; expected some of {', '.join(known)}")
    seeds = range(options.first, options.first + options.seeds)
    chosen = [name for place, name in enumerate(chosen) if len(seeds) >= len(chosen) or place < len(seeds)]
    absent = [name for name in chosen if not (base / "given" / name / "expected.json").exists()]
    for name in absent:
        for stale in ("given", "undisturbed"):
            shutil.rmtree(base / stale / name, ignore_errors=True)
    must(spread([(name, lambda name=name: trial.build(base, name)) for name in absent], options.jobs))

    def work(name: str, seed: int) -> int:
        result = trial.run(base, name, seed)
        (base / f"result_{seed}.json").write_text(json.dumps([result.good, result.outcome, result.line()]))
        return 0

    counts, bad = collections.defaultdict(collections.Counter), 0
    names = {seed: chosen[seed % len(chosen)] for seed in seeds}
    for seed, status in spread(((seed, lambda s=seed: work(names[s], s)) for seed in seeds), options.jobs):
        file = base / f"result_{seed}.json"
        good, outcome, line = False, "broken trial", f"broken trial: seed {seed}, {names[seed]}: status {status}"
        if status == 0:
            good, outcome, line = json.loads(file.read_text())
            file.unlink()
        counts[names[seed]][outcome] += 1
        bad += not good
        if options.list or not good:
            print(("" if good else "BAD ") + line, flush=True)
    print("\n".join(table(counts)))
    print(f"{len(seeds)} trials, {bad} bad", flush=True)
    if not options.base and not bad:
        shutil.rmtree(base)
    elif bad:
        print(f"the folders of the bad ones are kept in {base / 'trials'}")
    return int(bad > 0)


def table(counts: dict[str, collections.Counter]) -> list[str]:
    """A row for each subject, a column for each outcome, and the sum."""
    outcomes = sorted({outcome for row in counts.values() for outcome in row})
    rows = [["", *outcomes]]
    rows += [[name, *(str(row[outcome] or "") for outcome in outcomes)] for name, row in counts.items()]
    rows += [["all", *(str(sum(row[outcome] for row in counts.values())) for outcome in outcomes)]]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


if __name__ == "__main__":
    sys.exit(main())
