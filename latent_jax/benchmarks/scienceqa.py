"""ScienceQA (Lu et al., 2022): multiple choice with or without an image and a hint; the official report's nine numbers.

`official`: the letter alone, "B. ..." or exactly one "The answer is B." (LLaVA's reading of the official pattern); what
names no offered letter is wrong, where the official code draws one at random. `lmms_eval`: only the letter alone, in
either case, or "B....".
"""

import re
from collections.abc import Sequence

from latent_jax.benchmarks.estimates import Estimate, mean, present
from latent_jax.benchmarks.letters import ALPHABET, MOST, offered
from latent_jax.benchmarks.rows import Row, field, texts

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


def report(rows: Sequence[Row], scorer: str, seed: int = 0) -> dict[str, Estimate]:
    """NAT SOC LAN (subject), TXT IMG NO (hint, image, neither), G1-6 G7-12 and their overall average."""
    groups = {
        **{name: [row for row in rows if row.item.question["subject"] == full] for name, full in SUBJECTS.items()},
        "TXT": [row for row in rows if row.item.question["hint"]],
        "IMG": [row for row in rows if row.item.images],
        "NO": [row for row in rows if not row.item.images and not row.item.question["hint"]],
        "G1-6": [row for row in rows if row.item.question["grade"] in YOUNG],
        "G7-12": [row for row in rows if row.item.question["grade"] in OLD],
        "Avg": rows,
    }
    return present(
        {name: mean([row.correct for row in its], [row.item.cluster for row in its]) for name, its in groups.items()}
    )


def submission(rows: Sequence[Row]) -> tuple[str, dict]:
    """The official evaluation's results file; -1 where the reply names no choice."""
    places = {row.item.id: ALPHABET.index(row.parsed) if row.parsed else -1 for row in rows}
    return "scienceqa_results.json", {"results": places}
