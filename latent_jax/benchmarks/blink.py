"""BLINK (Fu et al., 2024): 14 perception tasks, up to four images a question, multiple choice.

`official`: the letter alone, else the only word "(A)" of the last paragraph, else of the whole reply; the official code
then asks a language model what the reply means, and we read its beginning instead, else the only "(A)" within other
characters. `lmms_eval`: the letter that the reply begins with. Unlike lmms-eval's pattern ours takes whole letters
only: "The second" is no T, "A dog" is an article. `macro` is the official mean of the sub-tasks, `micro` VLMEvalKit's
share of all questions.
"""

import re
from collections.abc import Sequence

from latent_jax.benchmarks import letters, lmms_eval
from latent_jax.benchmarks.estimates import Estimate, average, mean, present
from latent_jax.benchmarks.items import ScoredItem, field, texts

SCORERS = ("official", "lmms_eval")
ORIGINAL = "BLINK_Benchmark 2d6a779"
SPLITS = ("validation", "test")
EMBEDDED = "scenes_blink"
PUBLISHED = {"validation": 1901, "test": 1906}
TASKS = (
    "Art_Style",
    "Counting",
    "Forensic_Detection",
    "Functional_Correspondence",
    "IQ_Test",
    "Jigsaw",
    "Multi-view_Reasoning",
    "Object_Localization",
    "Relative_Depth",
    "Relative_Reflectance",
    "Semantic_Correspondence",
    "Spatial_Relation",
    "Visual_Correspondence",
    "Visual_Similarity",
)
MAX_NEW_TOKENS = 1024  # of both: query_model.py, and lmms-eval's task
NOTE = "Note: You only need to respond with {letters} without providing any additional information.\n"
# Sent to the letter: models that refuse to judge photographs of people answer behind it.
DISCLAIMER = (
    "Disclaimer: This is not to make unfair assumptions about the people in the image and you just need to give your "
    "assessment on this question. You don't need to identify the real people. You just need to analyze based on the "
    "information I gave you.\n\n"
)
DISCLAIMED = ("Art_Style", "Forensic_Detection", "Jigsaw")
PROMPT = {
    "official": f"{DISCLAIMER}{{prompt}}  [the disclaimer: {', '.join(DISCLAIMED)}]",
    "lmms_eval": NOTE + "{prompt}",
}
HIDDEN = "hidden"


def check(question: dict, images: int) -> None:
    field(question, "question", str)
    field(question, "prompt", str)
    choices, right = texts(question, "choices", 2, letters.MOST), field(question, "answer", str)
    if right != HIDDEN and right not in _names(choices):
        raise ValueError(f"its answer {right!r} is not one of {', '.join(_names(choices))}")
    if field(question, "sub_task", str) not in TASKS:
        raise ValueError(f"its sub_task is {question['sub_task']!r}, expected one of {', '.join(TASKS)}")
    if not 1 <= images <= 4:
        raise ValueError(f"has {images} images, expected 1 to 4")


def cluster(question: dict, key: str) -> str:
    return key


def prompt(question: dict, scorer: str) -> str:
    choices = question["choices"]
    if scorer == "lmms_eval":
        note = NOTE.format(letters=", ".join(letters.offered(len(choices))))
    else:
        note = DISCLAIMER if question.get("sub_task") in DISCLAIMED else ""
    lines = [f"{name} {text}" for name, text in zip(_names(choices), choices, strict=True)]
    # A file without the published prompt gets one of its form.
    return note + (
        question["prompt"] or "\n".join([question["question"], "Select from the following choices.", *lines])
    )


def answer(question: dict) -> str | None:
    return None if question["answer"] == HIDDEN else question["answer"]


def parse(reply: str, question: dict, scorer: str) -> str | None:
    choices, place = question["choices"], None
    if scorer == "official":
        place = _official(reply.strip(), len(choices))
    if place is None:
        place = letters.leading(reply, choices)
    if place is None and scorer == "official":
        place = _only_marked(reply, choices)
    found = letters.letter(place)
    if scorer == "lmms_eval":
        found = lmms_eval.agreed(found, lmms_eval.blink(reply))
    return found and f"({found})"


def correct(parsed: str | None, question: dict, scorer: str) -> bool:
    return parsed == question["answer"]


def report(scored: Sequence[ScoredItem], scorer: str, seed: int = 0) -> dict[str, Estimate]:
    tasks = {task: [one for one in scored if one.item.question["sub_task"] == task] for task in TASKS}
    found = present({task: _mean(its) for task, its in tasks.items()})
    return present({**found, "macro": average(list(found.values())), "micro": _mean(scored)})


def submission(scored: Sequence[ScoredItem]) -> tuple[str, dict]:
    """The leaderboard's form, which scores the test split."""
    return "blink_predictions.json", {one.item.id: one.parsed or "" for one in scored}


def _mean(scored: Sequence[ScoredItem]) -> Estimate | None:
    return mean([one.right for one in scored], [one.item.cluster for one in scored])


def _names(choices: Sequence[str]) -> list[str]:
    return [f"({name})" for name in letters.offered(len(choices))]


def _only_marked(text: str, choices: Sequence[str]) -> int | None:
    found = (letters.only_marked(part, choices, small=False) for part in (text.strip().rpartition("\n\n")[2], text))
    return next((place for place in found if place is not None), None)


def _official(text: str, count: int) -> int | None:
    if len(text) == 1 and text in letters.offered(count):
        return letters.ALPHABET.index(text)
    for part in (text.rpartition("\n\n")[2], text):
        # Words between spaces: neither "(A)." nor "**(A)**" is one.
        named = {word[1] for word in part.split() if re.fullmatch(rf"\([{letters.offered(count)}]\)", word)}
        if len(named) == 1:
            return letters.ALPHABET.index(named.pop())
    return None
