"""Which examples each step of a fine-tuning run sees: ours, in our order, as rows of a stock model."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grain

from latent_jax.config import schema
from latent_jax.data import pipeline
from latent_jax.errors import UserError
from latent_jax.methods import sft
from latent_jax.runtime import metrics
from latent_jax.training.workdir import CONFIG
from third_party.processor import Processor, Row

# What decides which conversations stand in which step.
_ORDER = ("seed", "data.name", "data.path", "data.split", "data.share", "chat")


@dataclasses.dataclass(frozen=True)
class Pace:
    """How many examples each step takes: `train.batch_size`, or what a run of ours with packed rows took.

    Packing takes what fits, so that a step of ours may hold fewer examples than batch_size. taken and skipped: of that
    run's steps from the first, examples and records passed over until then; empty = batch_size always.
    """

    batch_size: int
    taken: tuple[int, ...] = ()
    skipped: tuple[int, ...] = ()

    @classmethod
    def of(cls, config, like: str | Path | None) -> "Pace":
        """Follows the run in the workdir `like`. Raises UserError where that run saw other conversations."""
        if like is None:
            return cls(config.train.batch_size)
        theirs, _ = schema.read(Path(like) / CONFIG)
        ours, theirs = schema.leaves(config), schema.leaves(theirs)
        for key in (key for key in ours if key in _ORDER or key.split(".")[0] in _ORDER):
            if key not in theirs or theirs[key][0] != ours[key][0]:
                raise UserError(
                    f"config.{key}: got {ours[key][0]!r}, but the run in {like} has "
                    f"{theirs[key][0] if key in theirs else None!r}; expected the same conversations"
                )
        file = Path(like) / "metrics.jsonl"
        lines = metrics.read(file) if file.exists() else []
        if [line["step"] for line in lines] != list(range(1, len(lines) + 1)) or len(lines) < config.train.steps:
            raise UserError(
                f"{file}: expected a line for each of {config.train.steps} steps, found {len(lines)}; --like takes a "
                "run with config.log.every = 1 and at least as many steps"
            )
        return cls(
            config.train.batch_size,
            tuple(line["examples"] for line in lines),
            tuple(line["skipped"] for line in lines),
        )

    def examples(self, step: int) -> int:
        """Of `step`, counted from 1."""
        return self.taken[step - 1] if self.taken else self.batch_size

    def check(self, step: int, skipped: int) -> None:
        """Called with the first example of `step`. Raises UserError where that is not the one that ours began with."""
        if self.skipped and step > 1 and skipped != self.skipped[step - 2]:
            raise UserError(
                f"step {step}: {skipped} records were skipped before it, {self.skipped[step - 2]} in the run that is "
                "followed; a record was too long for its budgets, expected a larger config.data.tokens or data.patches"
            )


@dataclasses.dataclass(frozen=True)
class _Broken:
    message: str


class Steps:
    """Iterates over steps: (rows, examples). `state` after a step is JSON-able; given back, the next step follows.

    Records that cannot be shown (a broken image) are skipped and counted, as in training; raises UserError where their
    share is above `config.data.max_bad`.
    """

    def __init__(self, data, processor: Processor, config, pace: Pace, state: dict[str, Any] | None = None):
        samples = pipeline.in_order(data, config.seed).map_with_index(_rows_of(processor, config))
        threads = config.data.threads
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4 * threads)
        self._samples = iter(samples.to_iter_dataset(options))
        self._pace, self._max_bad = pace, config.data.max_bad
        self._counts = {"step": 0, "seen": 0, "skipped": 0}
        if state:
            self._samples.set_state(state["position"])
            self._counts = {name: state[name] for name in self._counts}

    @property
    def state(self) -> dict[str, Any]:
        return {**self._counts, "position": self._samples.get_state()}

    @property
    def skipped(self) -> int:
        """Records passed over so far."""
        return self._counts["skipped"]

    def __next__(self) -> tuple[list[Row], int]:
        step = self._counts["step"] + 1
        rows: list[Row] = []
        taken, wanted = 0, self._pace.examples(step)
        while taken < wanted:
            sample = next(self._samples)
            self._counts["seen"] += 1
            if isinstance(sample, _Broken):
                self._skip(sample)
                continue
            if not taken:
                self._pace.check(step, self.skipped)
            rows += sample
            taken += 1
        self._counts["step"] = step
        return rows, taken

    def _skip(self, broken: _Broken) -> None:
        self._counts["skipped"] += 1
        pipeline.check_broken({**self._counts, "blank": 0, "broken": [broken.message]}, self._max_bad)


def _rows_of(processor: Processor, config) -> Callable[[int, dict], "list[Row] | _Broken"]:
    def rows(index: int, record: dict) -> "list[Row] | _Broken":
        try:
            return processor.teach(sft.conversations(record, int(index), config))
        except UserError as problem:
            return _Broken(f"record {record['key']!r}: {problem}")

    return rows
