"""GQA (Hudson and Manning, 2019): short free answers about real images, by the official eval.py or as lmms-eval does.

`official`: the reply in lower case without its final full stops (LLaVA's converter) must equal the answer. Metrics over
the balanced questions, named as eval.py prints them; its grounding needs attention maps and is left out. Consistency is
over the entailed questions that were asked as well. `distribution` is chi-square / 100 as printed there: lower is
better. `lmms_eval`: equality without case and punctuation.
"""

import string
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np

from latent_jax.benchmarks.estimates import Estimate, bootstrap, mean, present
from latent_jax.benchmarks.rows import Row, field, texts

SCORERS = ("official", "lmms_eval")
ORIGINAL = "GQA eval.py, replies as in LLaVA c121f04"
SPLITS = ("testdev", "validation", "test")
EMBEDDED = "scenes_questions"
PUBLISHED = {"testdev": 12_578}
MAX_NEW_TOKENS = 16
INSTRUCTION = "Answer the question using a single word or phrase."
PROMPT = dict.fromkeys(SCORERS, f"{{question}}\n{INSTRUCTION}")
_UNPUNCTUATED = str.maketrans("", "", string.punctuation)


def check(question: dict, images: int) -> None:
    field(question, "question", str)
    if images != 1:
        raise ValueError(f"has {images} images, expected 1")
    if not field(question, "answer", str):
        return  # the splits with hidden answers hide the rest as well
    field(question, "isBalanced", bool)
    if "choices" in question:
        check_choices({question["id"]: question["choices"]}, {question["id"]: question})
    types = field(question, "types", dict)
    field(types, "structural", str)
    if "choices" in question or "detailed" in types:  # only validity and plausibility read it
        field(types, "detailed", str)
    field(field(question, "groups", dict), "global", (str, type(None)))
    texts(question, "entailed", least=0)


def cluster(question: dict, key: str) -> str:
    return key


def prompt(question: dict, scorer: str) -> str:
    return f"{question['question']}\n{INSTRUCTION}"


def answer(question: dict) -> str | None:
    # The splits without answers (test, challenge) have no field for it, which the builder stores as "".
    return question["answer"] or None


def parse(reply: str, question: dict, scorer: str) -> str | None:
    said = reply.strip().lower()
    said = said.rstrip(".") if scorer == "official" else said.translate(_UNPUNCTUATED)
    return said or None


def correct(parsed: str | None, question: dict, scorer: str) -> bool:
    expected = question["answer"]
    return parsed == (expected if scorer == "official" else expected.lower().translate(_UNPUNCTUATED))


def report(
    rows: Sequence[Row], scorer: str, seed: int = 0, choices: Mapping[str, dict] | None = None
) -> dict[str, Estimate]:
    """choices: content of the split's *_choices.json, question id -> {"valid": [...], "plausible": [...]}.

    Without it, what the questions themselves hold as `choices`: the builder puts it there.
    """
    balanced = [row for row in rows if row.item.question["isBalanced"]]
    groups = {
        "accuracy": balanced,
        "binary": [row for row in balanced if row.item.question["types"]["structural"] != "query"],
        "open": [row for row in balanced if row.item.question["types"]["structural"] == "query"],
    }
    found = {name: mean([row.correct for row in its], _clusters(its)) for name, its in groups.items()}
    if scorer != "official":
        return present(found)
    found |= {"consistency": _consistency(rows, balanced), "distribution": _distribution(balanced, seed)}
    if choices is None and all("choices" in row.item.question for row in balanced):
        choices = {row.item.id: row.item.question["choices"] for row in balanced}
    if choices is not None:
        for name, kind in (("validity", "valid"), ("plausibility", "plausible")):
            found[name] = mean([_belongs(row, choices, kind) for row in balanced], _clusters(balanced))
    return present(found)


def check_choices(choices: object, questions: Mapping[str, dict]) -> None:
    """Raises ValueError where a choices file is not that of these questions."""
    for name in questions:
        its = choices.get(name) if isinstance(choices, dict) else None
        if not isinstance(its, dict) or not all(isinstance(its.get(kind), list) for kind in ("valid", "plausible")):
            raise ValueError(f'choices has no {{"valid": [...], "plausible": [...]}} of question {name}')


def submission(rows: Sequence[Row]) -> tuple[str, list[dict]]:
    """The file that eval.py and the leaderboard take."""
    return "gqa_predictions.json", [{"questionId": row.item.id, "prediction": row.parsed or ""} for row in rows]


def _clusters(rows: Sequence[Row]) -> list[str]:
    return [row.item.cluster for row in rows]


def _consistency(rows: Sequence[Row], balanced: Sequence[Row]) -> Estimate | None:
    """How often the questions that a rightly answered one entails are answered rightly too."""
    right = {row.item.id: row.correct for row in rows}
    values, clusters = [], []
    for row in balanced:
        others = [name for name in row.item.question["entailed"] if name != row.item.id and name in right]
        if row.correct and others:
            values.append(Fraction(sum(right[name] for name in others), len(others)))
            clusters.append(row.item.cluster)
    return mean(values, clusters)


def _belongs(row: Row, choices: Mapping[str, dict], kind: str) -> bool:
    # What two things have in common is asked of attributes, of which the choices file names only the values.
    common = "Common" in row.item.question["types"].get("detailed", "")
    return row.parsed in (("color", "material", "shape") if common else choices[row.item.id][kind])


def _distribution(rows: Sequence[Row], seed: int) -> Estimate | None:
    """Chi-square of the replies against the answers, over the answers that occur in each global group."""
    grouped = [row for row in rows if row.item.question["groups"]["global"] is not None]
    if not grouped:
        return None
    gold, said = defaultdict(Counter), defaultdict(Counter)
    for row in grouped:
        group = row.item.question["groups"]["global"]
        gold[group][row.item.question["answer"]] += 1
        said[group][row.parsed] += 1
    total = sum(
        sum(Fraction((said[group][one] - count) ** 2, count) for one, count in counts.items()) * counts.total()
        for group, counts in gold.items()
    )
    value = total / len(grouped) / 100
    return bootstrap(value, len(grouped), *_resampled(grouped), seed)


def _resampled(rows: Sequence[Row]):
    """(statistic, number of clusters) for `bootstrap`: the same chi-square from counts by cluster."""
    cells: dict[tuple[str, str], int] = {}
    for row in rows:
        cells.setdefault((row.item.question["groups"]["global"], row.item.question["answer"]), len(cells))
    groups = {group: number for number, group in enumerate(dict.fromkeys(group for group, _ in cells))}
    member = np.zeros((len(cells), len(groups)))
    member[list(cells.values()), [groups[group] for group, _ in cells]] = 1
    places = {name: number for number, name in enumerate(dict.fromkeys(_clusters(rows)))}
    gold, said = np.zeros((2, len(places), len(cells)))
    for row in rows:
        place, group = places[row.item.cluster], row.item.question["groups"]["global"]
        gold[place, cells[group, row.item.question["answer"]]] += 1
        if (group, row.parsed) in cells:
            said[place, cells[group, row.parsed]] += 1

    def statistic(drawn: np.ndarray) -> np.ndarray:
        expected, observed = drawn @ gold, drawn @ said
        terms = np.divide((observed - expected) ** 2, expected, out=np.zeros_like(expected), where=expected > 0)
        sizes = expected @ member
        with np.errstate(invalid="ignore"):
            return ((terms @ member) * sizes).sum(1) / sizes.sum(1) / 100

    return statistic, len(places)
