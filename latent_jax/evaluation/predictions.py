"""predictions.jsonl: a line a question, appended as replies come; and results.json beside it, read back."""

import dataclasses
import json
import os
import re
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType

from latent_jax.benchmarks.items import Item, Reply, ScoredItem
from latent_jax.config.fields import check, shown
from latent_jax.errors import UserError
from latent_jax.runtime import files

PREDICTIONS, RESULTS = "predictions.jsonl", "results.json"
_ENOUGH = 20  # scored questions, before a score near zero says something
_UNSEALED = ("throughput", "git_commit", "checksum")
_KEYS = {"id", "prompt", "reply", "parsed", "answer", "correct", "cluster", "skipped", "spans"}


@dataclasses.dataclass(frozen=True)
class Scoring:
    """How a question becomes a scored item: the benchmark's module, one of its scorers, and a prompt template ('' =
    the scorer's own prompt)."""

    benchmark: ModuleType
    scorer: str
    template: str = ""

    def prompt(self, item: Item) -> str:
        """The scorer's own prompt, or the template with it and the bare question filled in."""
        own = self.benchmark.prompt(item.question, self.scorer)
        if not self.template:
            return own
        fill = {"{question}": item.question["question"], "{prompt}": own}
        return re.sub("|".join(map(re.escape, fill)), lambda match: fill[match[0]], self.template)

    def judge(self, item: Item, reply: str) -> ScoredItem:
        parsed = self.benchmark.parse(reply, item.question, self.scorer)
        hidden = self.benchmark.answer(item.question) is None
        correct = None if hidden else self.benchmark.correct(parsed, item.question, self.scorer)
        return ScoredItem(item, reply, parsed, correct, spans=getattr(reply, "spans", None))

    def skip(self, item: Item, why: str) -> ScoredItem:
        """A question that could not be asked: wrong, where its answer is known."""
        hidden = self.benchmark.answer(item.question) is None
        return ScoredItem(item, "", None, None if hidden else False, why)

    def line(self, row: ScoredItem) -> dict:
        return {
            "id": row.item.id,
            "prompt": self.prompt(row.item),
            "reply": row.reply,
            "parsed": row.parsed,
            "answer": self.benchmark.answer(row.item.question),
            "correct": row.correct,
            "cluster": row.item.cluster,
            **({"skipped": row.skipped} if row.skipped else {}),
            **({"spans": list(row.spans)} if row.spans else {}),
        }

    def text(self, row: ScoredItem) -> str:
        """A line of the file, with the checksum that tells a damaged one."""
        line = self.line(row)
        return json.dumps({**line, "sum": _sum(line)}) + "\n"


def resume(path: Path, items: Sequence[Item], scoring: Scoring) -> dict[str, ScoredItem]:
    """Question id -> what was replied in an earlier life; a last line that a kill tore is removed from the file.

    Raises UserError that names the line where it is not of this evaluation: a question that is not asked, one that
    stands there twice, one that was asked or judged otherwise.
    """
    asked, rows = {item.id: item for item in items}, {}
    whole = 0
    # Not splitlines, which also ends a line at a carriage return that damage put there.
    for number, line in enumerate(files.read_bytes(path).split(b"\n")[:-1] if path.exists() else [], 1):
        whole += len(line) + 1
        where = f"{path}:{number}"
        found, undamaged = _line(line, where)
        item = asked.get(found["id"])
        if item is None:
            raise UserError(f"{where}: question {found['id']} is not one of the {len(asked)} that are asked now")
        if item.id in rows:
            raise _second(where, item.id)
        why = found.get("skipped")
        row = scoring.skip(item, why) if why else scoring.judge(item, _reply(found, where))
        for key, now in scoring.line(row).items():
            if found.get(key) != now:
                raise UserError(
                    f"{where}: question {item.id} has {key} {found.get(key)!r}, expected {now!r}: the benchmark's "
                    "files or this program changed since; use a new --workdir"
                )
        if not undamaged:
            raise _damaged(where)
        rows[item.id] = row
    if path.exists() and path.stat().st_size > whole:
        os.truncate(path, whole)
    return rows


class Writer:
    """Appends rows to predictions.jsonl."""

    def __init__(self, path: Path, scoring: Scoring) -> None:
        self._path, self._scoring = path, scoring
        self._file = open(path, "a")  # noqa: SIM115 (held open for the run)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        with files.naming(self._path):  # closing writes what a full disk refused before
            self._file.close()

    def write(self, rows: Iterable[ScoredItem]) -> None:
        """A batch: once this returns, a kill of the process loses none of it."""
        with files.naming(self._path):
            self._file.writelines(map(self._scoring.text, rows))
            self._file.flush()


def strange(found: dict, scored: Sequence[ScoredItem]) -> str:
    """A line where the replies look like those of a model that never saw such a prompt; '' where they do not."""
    right = sum(row.right for row in scored)
    if len(scored) < _ENOUGH or (right > 0.02 * len(scored) and found["unparsed"] < 0.9 * found["asked"]):
        return ""
    return (
        f"{right} of {len(scored)} are right and {found['unparsed']} replies hold no answer: a model that was not "
        "trained on this form of prompt looks like that; try --config.evaluate.prompt='{question}', and read "
        "predictions.jsonl"
    )


def sealed(found: dict) -> dict:
    """What results.json holds, with a checksum of all but speed and commit: two equal evaluations have the same one."""
    scores = {key: value for key, value in found.items() if key not in _UNSEALED}
    return {**found, "checksum": files.checksum(json.dumps(scores, sort_keys=True))}


def read_results(directory: Path) -> dict:
    """results.json, as it was written; earlier ones have no checksum. Raises UserError where it is damaged."""
    found = files.read_json(directory / RESULTS, dict, "the results of an evaluation")
    if found != sealed(found) and "checksum" in found:
        raise UserError(f"{directory / RESULTS}: is not what the evaluation wrote (checksum); run it again")
    return found


def read(directory: Path) -> tuple[dict, list[dict]]:
    """(results.json, the lines of predictions.jsonl) of a finished evaluation. Raises UserError naming the file."""
    results = directory / RESULTS
    for file in (directory / PREDICTIONS, results):
        if not file.exists():
            raise UserError(f"{file}: no such file; expected the workdir of a finished evaluation")
    lines = files.read_bytes(directory / PREDICTIONS).split(b"\n")[:-1]
    found, rows = read_results(directory), {}
    for number, line in enumerate(lines, 1):
        row, undamaged = _line(line, where := f"{directory / PREDICTIONS}:{number}")
        if not undamaged:
            raise _damaged(where)
        if "correct" not in row or row["correct"] not in (True, False, None):
            raise UserError(f"{where}: correct is {shown(row.get('correct'))}, expected true, false or null (hidden)")
        if row["id"] in rows:
            raise _second(where, row["id"])
        rows[row["id"]] = row
    counts = {
        "asked": len(lines),
        "n": sum(row["correct"] is not None for row in rows.values()),
        "unparsed": sum(row.get("parsed") is None for row in rows.values()),
        "predictions": _digest(lines),
    }
    for key, now in counts.items():
        stated = found.get(key, None if key == "asked" else now)  # earlier versions kept fewer
        if type(stated) is not type(now) or stated != now:
            raise UserError(
                f"{results}: is not of the {len(lines)} lines of {PREDICTIONS} beside it ({key} is {shown(stated)}, "
                f"there {shown(now)}); finish the evaluation"
            )
    return found, list(rows.values())


def _line(line: bytes, where: str) -> tuple[dict, bool]:
    """A line without its checksum, and whether it is as it was written."""
    try:
        found = json.loads(line.decode())
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not all(isinstance(found.get(key), str) for key in ("id", "reply", "cluster")):
        raise UserError(f"{where}: expected a JSON object with id, prompt, reply, parsed, answer, correct and cluster")
    # Lines of before 2026-12 have no sum; all that they hold but the reply is checked against the question.
    summed, expected = "sum" in found, found.pop("sum", None)
    return found, (not summed or expected == _sum(found)) and found.keys() <= _KEYS


def _reply(found: dict, where: str) -> str:
    """The reply of a line, with the spans that it counts."""
    if "spans" not in found:
        return found["reply"]
    spans = check(f"{where}: spans", found["spans"], tuple[int, ...], dict(low=0))
    if len(spans) != 2 or spans[1] > spans[0]:
        raise UserError(f"{where}: spans is {shown(found['spans'])}, expected how many were opened and closed")
    return Reply(found["reply"], *spans)


def digest(path: Path) -> str:
    """Of all lines, in whatever order replies came."""
    return _digest(files.read_bytes(path).split(b"\n")[:-1])


def _digest(lines: Sequence[bytes]) -> str:
    return files.checksum(b"\n".join(sorted(lines)))


def _second(where: str, name: str) -> UserError:
    return UserError(f"{where}: question {name} stands here a second time; expected every question once")


def _damaged(where: str) -> UserError:
    return UserError(f"{where}: is damaged, it is not what was written; remove the line and it is asked again")


def _sum(line: dict) -> int:
    return zlib.crc32(json.dumps(line).encode())
