"""What a run wrote, without what is measured with a clock: the only numbers that may differ between two right runs."""

import json
from pathlib import Path

TIMED = {"step_seconds", "tokens_per_second", "data_wait_seconds", "mfu", "mfu_vision"}


def metrics(directory: Path) -> list[dict]:
    """The lines of a workdir's metrics.jsonl; none where it is not there yet."""
    file = directory / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [{name: value for name, value in line.items() if name not in TIMED} for line in lines]
