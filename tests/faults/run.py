"""Injures files and says what the commands make of it.

    python -m tests.faults.run --seeds=500 [--first=0] [--subjects=resume,raw_gqa] [--jobs=2] [--base=DIR] [--table]

A seed names the subject, the file and the injury: the same seed on the same code is the same trial. Exit status 1 where
an outcome is none of: equal numbers, one clear line, skipped and counted, another valid input taken as it stands.
"""

import sys

from tests.faults import driver, subjects, trial

DRIVER = driver.Driver(
    program="tests.faults.run",
    about=__doc__.splitlines()[0],
    unit="injuries",
    count_flag="--seeds",
    names_flag="--subjects",
    known=lambda: list(subjects.subjects()),
    ready=trial.ready,
    build=trial.build,
    trial=trial.run,
)

if __name__ == "__main__":
    sys.exit(DRIVER.main())
