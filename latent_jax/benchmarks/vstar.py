"""V* bench (Wu and Xie, 2023): small details of large images, multiple choice, two categories.

The authors compare likelihoods of the options; models that only speak are asked for a letter. `official`: the letter
that the reply begins with, else its only one in parentheses. `lmms_eval`: options as lines "A. ...", and between the
two the letter that the reply announces ("The answer is B"). lmms-eval goes on to take any stray letter; ours does not.
"""

from collections.abc import Sequence

from latent_jax.benchmarks import letters, lmms_eval
from latent_jax.benchmarks.estimates import Estimate, mean, present
from latent_jax.benchmarks.items import ScoredItem, field, texts

SCORERS = ("official", "lmms_eval")
ORIGINAL = "vstar 4ede664 (likelihoods there; letters here)"
SPLITS = ("test",)
EMBEDDED = ""
PUBLISHED = {"test": 191}
CATEGORIES = ("direct_attributes", "relative_position")
MAX_NEW_TOKENS = 16
INSTRUCTION = "Answer with the option's letter from the given choices directly."
PROMPT = {
    "official": f"{{question}}\n(A) {{choice}} ...\n{INSTRUCTION}",
    "lmms_eval": f"{{question}}\nA. {{choice}} ...\n{INSTRUCTION}\n{INSTRUCTION}",  # twice, see `prompt`
}


def check(question: dict, images: int) -> None:
    field(question, "question", str)
    names = list(letters.offered(len(texts(question, "choices", 2, letters.MOST))))
    if field(question, "answer", str) not in names:
        raise ValueError(f"its answer {question['answer']!r} is not one of {', '.join(names)}")
    if field(question, "category", str) not in CATEGORIES:
        raise ValueError(f"its category is {question['category']!r}, expected one of {', '.join(CATEGORIES)}")
    if not isinstance(question.get("text", ""), str):
        raise ValueError(f"'text' is {question['text']!r}, expected a text")
    if images != 1:
        raise ValueError(f"has {images} images, expected 1")


def cluster(question: dict, key: str) -> str:
    return key


def prompt(question: dict, scorer: str) -> str:
    if scorer == "lmms_eval" and question.get("text"):
        # It keeps the instruction of the published text in the last option and adds it once more; a question without
        # that text (from the JSON files) has it once.
        return f"{lmms_eval.vstar_text(question['text'])}\n{INSTRUCTION}"
    form = "({}) {}" if scorer == "official" else "{}. {}"
    choices = [form.format(*each) for each in zip(letters.ALPHABET, question["choices"], strict=False)]
    return "\n".join([question["question"], *choices, INSTRUCTION])


def answer(question: dict) -> str | None:
    return question["answer"]


def parse(reply: str, question: dict, scorer: str) -> str | None:
    choices = question["choices"]
    place = letters.leading(reply, choices)
    if place is None and scorer == "lmms_eval":
        place = letters.announced(reply, choices)
    found = letters.letter(letters.only_marked(reply, choices) if place is None else place)
    return lmms_eval.agreed(found, lmms_eval.vstar(reply)) if scorer == "lmms_eval" else found


def correct(parsed: str | None, question: dict, scorer: str) -> bool:
    return parsed == question["answer"]


def report(scored: Sequence[ScoredItem], scorer: str, seed: int = 0) -> dict[str, Estimate]:
    groups = {name: [one for one in scored if one.item.question["category"] == name] for name in CATEGORIES}
    groups["overall"] = list(scored)
    return present(
        {name: mean([one.right for one in its], [one.item.cluster for one in its]) for name, its in groups.items()}
    )
