"""ScienceQA (Lu et al., 2022): multiple choice with or without an image and a hint; the official report's nine numbers.

`official`: the letter alone, "B. ..." or exactly one "The answer is B." (LLaVA's reading of the official pattern); what
names no offered letter is wrong, where the official code draws one at random. `lmms_eval`: only the letter alone, in
either case, or "B....".
"""

import re
from collections.abc import Sequence

from latent_jax.benchmarks.estimates import Estimate, mean, present
from latent_jax.benchmarks.items import ScoredItem, field, texts
from latent_jax.benchmarks.letters import ALPHABET, MOST, offered

SCORERS = ("official", "lmms_eval")
ORIGINAL = "ScienceQA 360b71c, replies as in LLaVA c121f04"
SPLITS = ("test", "validation")
EMBEDDED = "scenes_scienceqa"
PUBLISHED = {"test": 4241}
MAX_NEW_TOKENS = {"official": 512, "lmms_eval": 16}
INSTRUCTION = "Answer with the option's letter from the given choices directly."
PROMPT = dict.fromkeys(
    SCORERS, f"Context: {{hint}}  [only with a hint]\n{{question}}\nA. {{choice}} ...\n{INSTRUCTION}"
)
SUBJECTS = {"NAT": "natural science", "SOC": "social science", "LAN": "language science"}
YOUNG, OLD = ({f"grade{n}" for n in grades} for grades in (range(1, 7), range(7, 13)))
_OPTIONS = "ABCDE"  # of the official code, however many a question has
# Whatever stands behind the letter is part of the phrase: "The answer is AThe answer is AA" holds it once.
_PHRASE = re.compile(r"The answer is (?P<letter>[A-Z])[^\n]")


def check(question: dict, images: int) -> None:
    field(question, "question", str)
    field(question, "hint", str)
    choices, place = texts(question, "choices", 2, MOST), field(question, "answer", int)
    if not 0 <= place < len(choices):
        raise ValueError(f"its answer {place} is not one of the {len(choices)} choices")
    if field(question, "subject", str) not in SUBJECTS.values():
        raise ValueError(f"its subject is {question['subject']!r}, expected one of {', '.join(SUBJECTS.values())}")
    if field(question, "grade", str) not in YOUNG | OLD:
        raise ValueError(f"its grade is {question['grade']!r}, expected grade1 to grade12")
    if images > 1:
        raise ValueError(f"has {images} images, expected at most 1")


def cluster(question: dict, key: str) -> str:
    return key


def prompt(question: dict, scorer: str) -> str:
    context = [f"Context: {question['hint']}"] if question["hint"] else []
    choices = [f"{name}. {text}" for name, text in zip(ALPHABET, question["choices"], strict=False)]
    return "\n".join([*context, question["question"], *choices, INSTRUCTION])


def answer(question: dict) -> str | None:
    return ALPHABET[question["answer"]]


def parse(reply: str, question: dict, scorer: str) -> str | None:
    said, names = reply.strip(), offered(len(question["choices"]))
    if scorer == "lmms_eval":
        found = said.upper() if len(said) == 1 else said[:1] if said[1:2] == "." else ""
    elif said[:1] in [*_OPTIONS, *names] and (len(said) == 1 or said[1:3] == ". "):
        found = said[0]  # of a letter that is not offered the official code reads no further
    else:
        phrases = _PHRASE.findall(said)
        found = phrases[0] if len(phrases) == 1 else ""
    return found if found and found in names else None


def correct(parsed: str | None, question: dict, scorer: str) -> bool:
    return parsed == answer(question)


def report(scored: Sequence[ScoredItem], scorer: str, seed: int = 0) -> dict[str, Estimate]:
    """NAT SOC LAN (subject), TXT IMG NO (hint, image, neither), G1-6 G7-12 and their overall average."""
    groups = {
        **{name: [one for one in scored if one.item.question["subject"] == full] for name, full in SUBJECTS.items()},
        "TXT": [one for one in scored if one.item.question["hint"]],
        "IMG": [one for one in scored if one.item.images],
        "NO": [one for one in scored if not one.item.images and not one.item.question["hint"]],
        "G1-6": [one for one in scored if one.item.question["grade"] in YOUNG],
        "G7-12": [one for one in scored if one.item.question["grade"] in OLD],
        "Avg": scored,
    }
    return present(
        {name: mean([one.right for one in its], [one.item.cluster for one in its]) for name, its in groups.items()}
    )


def submission(scored: Sequence[ScoredItem]) -> tuple[str, dict]:
    """The official evaluation's results file; -1 where the reply names no choice."""
    places = {one.item.id: ALPHABET.index(one.parsed) if one.parsed else -1 for one in scored}
    return "scienceqa_results.json", {"results": places}
