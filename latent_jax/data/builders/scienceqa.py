"""ScienceQA (https://github.com/lupantech/ScienceQA, data/scienceqa) to one record a problem, with or without image."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latent_jax.data.builders import files, parts
from latent_jax.data.builders.base import RawBuilder, each, record
from latent_jax.data.builders.parts import Part, Record
from latent_jax.data.builders.tally import Tally
from latent_jax.errors import UserError

_SHAPE = '{problem id: {"question", "choices", "answer", "image", "split", ...}}'
_SPLITS = ("train", "val", "test")
_TEXTS = ("hint", "task", "grade", "subject", "topic", "category", "skill", "lecture", "solution")


class ScienceQa(RawBuilder):
    """One record a problem in the order of pid_splits.json: no or one image, one question with all official fields."""

    name = "scienceqa"
    NOUN = "problem"
    PUBLISHED = {"train": 12726, "validation": 4241, "test": 4241}

    def find(self) -> dict[str, Any]:
        """Split -> official split name."""
        shape = '{"train": [problem id, ...], "val": [...], "test": [...]}'
        self._pids = files.read_json(self.raw / "pid_splits.json", dict, shape)
        self._repeated = Tally("")  # belongs to no split: told with the first
        self._problems = files.read_entries(self.raw / "problems.json", _SHAPE, "problem", self._repeated)
        for split in _SPLITS:
            pids = self._pids.get(split)
            if not isinstance(pids, list) or not all(isinstance(pid, str) for pid in pids):
                raise UserError(f"{self.raw / 'pid_splits.json'}: expected {shape}, but {split!r} is {str(pids)[:40]}")
        return {files.split_name(split): split for split in _SPLITS if self._pids[split]}

    def parts(self, place: Any, tally: Tally) -> list[Part]:
        """Problems, some at a time: (problem id, problem)."""
        file = self.raw / "problems.json"
        problems, repeated, self._repeated = self._problems, self._repeated, Tally("")
        tally.add([repeated.state()])
        usable, listed = [], dict.fromkeys(self._pids[place])
        for pid in listed:
            reason = f"in pid_splits.json's {place}, but not in problems.json" if pid not in problems else ""
            reason = reason or _fault(problems[pid], place)
            if reason:
                tally.see("problem")
                tally.skip("problem", f"{file}: problem {pid}: {reason}")
            else:
                usable.append((pid, problems[pid]))
        for pid, problem in problems.items():
            if isinstance(problem, dict) and problem.get("split") == place and pid not in listed:
                tally.see("problem")
                tally.skip("problem", f"{file}: problem {pid}: not in pid_splits.json's {place}")
        return parts.chunks(usable, (file, self.raw / "pid_splits.json"))

    def examples(self, part: Part, tally: Tally) -> Iterator[Record]:
        def make(item: tuple[str, dict[str, Any]]) -> Record:
            pid, problem = item
            question = {"id": pid, **dict.fromkeys(_TEXTS, ""), **problem}
            try:
                images = [files.read_image(self._locate(pid, problem))] if problem.get("image") else []
                return record(pid, images=images, questions=[question])
            except ValueError as error:
                raise ValueError(f"problem {pid}: {error}") from None

        return each(part.place, "problem", tally, make, lambda item: item[0])

    def _locate(self, pid: str, problem: dict[str, Any]) -> Path:
        end = f"{problem['split']}/{pid}/{problem['image']}"
        return files.first_there([files.inside(self.raw, end), files.inside(self.raw / "images", end)])


def _fault(problem: Any, split: str) -> str:
    """What is wrong with an official record, in words, or ""."""
    if not isinstance(problem, dict) or not files.is_text(problem.get("question")):
        return "no question"
    choices, answer = problem.get("choices"), problem.get("answer")
    if not files.are_texts(choices):
        return f"choices {str(choices)[:40]}, expected a list of texts"
    if type(answer) is not int or not 0 <= answer < len(choices):
        return f"answer {answer!r}, expected an integer from 0 to {len(choices) - 1}"
    if problem.get("split") != split:
        return f"split {problem.get('split')!r}, but pid_splits.json has it in {split}"
    if not isinstance(problem.get("image"), str | None):
        return f"image {problem['image']!r}, expected a file name or null"
    wrong = [field for field in _TEXTS if not isinstance(problem.get(field, ""), str)]
    return f"{wrong[0]} is not text" if wrong else ""
