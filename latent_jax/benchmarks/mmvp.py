"""MMVP (Tong et al., 2024): pairs of images that CLIP takes for the same, one question with two options about each.

The authors let a language model judge free replies to question and options in one line, `official`; we read the letter
instead (its beginning, else its only one in parentheses). `lmms_eval`: options as lines "A. ...", and the letter that
the reply announces counts too. A pair is right where both its questions are (ids 1 and 2, 3 and 4, ...). Four answers
that lmms-eval swaps are left as published.
"""

import re
from collections import defaultdict
from collections.abc import Sequence

from latent_jax.benchmarks import letters, lmms_eval
from latent_jax.benchmarks.estimates import Estimate, mean, present
from latent_jax.benchmarks.items import ScoredItem, field

SCORERS = ("official", "lmms_eval")
ORIGINAL = "MMVP 7635005 (a language model judges there; letters here)"
SPLITS = ("test", "train")
EMBEDDED = ""
PUBLISHED = {"test": 300, "train": 300}
MAX_NEW_TOKENS = 16
INSTRUCTION = "Answer with the option's letter from the given choices directly."
PROMPT = {
    "official": f"{{question}} {{options}}\n{INSTRUCTION}",
    "lmms_eval": f"{{question}}\nA. {{option}}\nB. {{option}}\n{INSTRUCTION}",
}
_MARK = re.compile(r"\(([a-z])\)")


def check(question: dict, images: int) -> None:
    field(question, "question", str)
    if _MARK.findall(field(question, "options", str)) != ["a", "b"]:
        raise ValueError(f"its options are {question['options']!r}, expected '(a) ... (b) ...'")
    if field(question, "answer", str) not in ("(a)", "(b)"):
        raise ValueError(f"its answer {question['answer']!r} is not one of (a), (b)")
    if not field(question, "id", str).isdecimal() or int(question["id"]) < 1:
        raise ValueError(f"its id {question['id']!r} is not an index from 1, by which pairs are found")
    if images != 1:
        raise ValueError(f"has {images} images, expected 1")


def cluster(question: dict, key: str) -> str:
    """The pair: its two questions are about nearly the same image."""
    return str((int(question["id"]) + 1) // 2)


def prompt(question: dict, scorer: str) -> str:
    if scorer == "official":
        return f"{question['question']} {question['options']}\n{INSTRUCTION}"
    options = [f"{name}. {text}" for name, text in zip("AB", _options(question), strict=True)]
    return "\n".join([question["question"], *options, INSTRUCTION])


def answer(question: dict) -> str | None:
    return question["answer"]


def parse(reply: str, question: dict, scorer: str) -> str | None:
    options = _options(question)
    place = letters.leading(reply, options)
    if place is None and scorer == "lmms_eval":
        place = letters.announced(reply, options)
    if place is None:
        place = letters.only_marked(reply, options)
    found = letters.letter(place)
    if scorer == "lmms_eval":
        found = lmms_eval.agreed(found, lmms_eval.mmvp(reply))
    return found and f"({found.lower()})"


def correct(parsed: str | None, question: dict, scorer: str) -> bool:
    return parsed == question["answer"]


def report(scored: Sequence[ScoredItem], scorer: str, seed: int = 0) -> dict[str, Estimate]:
    """`pairs` leaves out a pair of which only one question was asked."""
    pairs: dict[str, list[bool]] = defaultdict(list)
    for one in scored:
        pairs[one.item.cluster].append(one.right)
    whole = {name: all(both) for name, both in pairs.items() if len(both) == 2}
    questions = mean([one.right for one in scored], [one.item.cluster for one in scored])
    return present({"questions": questions, "pairs": mean(whole.values(), whole.keys())})


def _options(question: dict) -> list[str]:
    return [text.strip() for text in _MARK.split(question["options"])[2::2]]
