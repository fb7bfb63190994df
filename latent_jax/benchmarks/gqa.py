"""GQA (Hudson and Manning, 2019): short free answers about real images, by the official eval.py or as lmms-eval does.

`official`: the reply in lower case without its final full stops (LLaVA's converter) must equal the answer. Metrics over
the balanced questions, named as eval.py prints them; its grounding needs attention maps and is left out. Consistency is
over the entailed questions that were asked as well. `distribution` is chi-square / 100 as printed there: lower is
better. `lmms_eval`: equality without case and punctuation.
"""

import string
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

import numpy as np

from latent_jax.benchmarks.estimates import Estimate, bootstrap, mean, present
from latent_jax.benchmarks.items import ScoredItem, field, texts

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
    scored: Sequence[ScoredItem], scorer: str, seed: int = 0, choices: Mapping[str, dict] | None = None
) -> dict[str, Estimate]:
    """choices: content of the split's *_choices.json, question id -> {"valid": [...], "plausible": [...]}.

    Without it, what the questions themselves hold as `choices`: the builder puts it there.
    """
    balanced = [one for one in scored if one.item.question["isBalanced"]]
    groups = {
        "accuracy": balanced,
        "binary": [one for one in balanced if one.item.question["types"]["structural"] != "query"],
        "open": [one for one in balanced if one.item.question["types"]["structural"] == "query"],
    }
    found = {name: mean([one.right for one in its], _clusters(its)) for name, its in groups.items()}
    if scorer != "official":
        return present(found)
    found |= {"consistency": _consistency(scored, balanced), "distribution": _distribution(balanced, seed)}
    if choices is None and all("choices" in one.item.question for one in balanced):
        choices = {one.item.id: one.item.question["choices"] for one in balanced}
    if choices is not None:
        for name, kind in (("validity", "valid"), ("plausibility", "plausible")):
            found[name] = mean([_belongs(one, choices, kind) for one in balanced], _clusters(balanced))
    return present(found)


def check_choices(choices: object, questions: Mapping[str, dict]) -> None:
    """Raises ValueError where a choices file is not that of these questions."""
    for name in questions:
        its = choices.get(name) if isinstance(choices, dict) else None
        if not isinstance(its, dict) or not all(isinstance(its.get(kind), list) for kind in ("valid", "plausible")):
            raise ValueError(f'choices has no {{"valid": [...], "plausible": [...]}} of question {name}')


def submission(scored: Sequence[ScoredItem]) -> tuple[str, list[dict]]:
    """The file that eval.py and the leaderboard take."""
    return "gqa_predictions.json", [{"questionId": one.item.id, "prediction": one.parsed or ""} for one in scored]


def _clusters(scored: Sequence[ScoredItem]) -> list[str]:
    return [one.item.cluster for one in scored]


def _consistency(scored: Sequence[ScoredItem], balanced: Sequence[ScoredItem]) -> Estimate | None:
    """How often the questions that a rightly answered one entails are answered rightly too."""
    right = {one.item.id: one.right for one in scored}
    values, clusters = [], []
    for one in balanced:
        others = [name for name in one.item.question["entailed"] if name != one.item.id and name in right]
        if one.right and others:
            values.append(Fraction(sum(right[name] for name in others), len(others)))
            clusters.append(one.item.cluster)
    return mean(values, clusters)


def _belongs(one: ScoredItem, choices: Mapping[str, dict], kind: str) -> bool:
    # What two things have in common is asked of attributes, of which the choices file names only the values.
    common = "Common" in one.item.question["types"].get("detailed", "")
    return one.parsed in (("color", "material", "shape") if common else choices[one.item.id][kind])


def _distribution(scored: Sequence[ScoredItem], seed: int) -> Estimate | None:
    """Chi-square of the replies against the answers, over the answers that occur in each global group."""
    grouped = [one for one in scored if one.item.question["groups"]["global"] is not None]
    if not grouped:
        return None
    gold: dict[str, Counter[str]] = defaultdict(Counter)
    said: dict[str, Counter[str | None]] = defaultdict(Counter)
    for one in grouped:
        group = one.item.question["groups"]["global"]
        gold[group][one.item.question["answer"]] += 1
        said[group][one.parsed] += 1
    total = Fraction(0)
    for group, counts in gold.items():
        terms = (Fraction((said[group][reply] - count) ** 2, count) for reply, count in counts.items())
        total += sum(terms, Fraction(0)) * counts.total()
    value = total / len(grouped) / 100
    return bootstrap(value, len(grouped), *_resampled(grouped), seed)


def _resampled(scored: Sequence[ScoredItem]) -> tuple[Callable[[np.ndarray], np.ndarray], int]:
    """(statistic, number of clusters) for `bootstrap`: the same chi-square from counts by cluster."""
    cells: dict[tuple[str, str | None], int] = {}
    for one in scored:
        cells.setdefault((one.item.question["groups"]["global"], one.item.question["answer"]), len(cells))
    groups = {group: number for number, group in enumerate(dict.fromkeys(group for group, _ in cells))}
    member = np.zeros((len(cells), len(groups)))
    member[list(cells.values()), [groups[group] for group, _ in cells]] = 1
    places = {name: number for number, name in enumerate(dict.fromkeys(_clusters(scored)))}
    gold, said = np.zeros((2, len(places), len(cells)))
    for one in scored:
        place, group = places[one.item.cluster], one.item.question["groups"]["global"]
        gold[place, cells[group, one.item.question["answer"]]] += 1
        if (group, one.parsed) in cells:
            said[place, cells[group, one.parsed]] += 1

    def statistic(drawn: np.ndarray) -> np.ndarray:
        expected, observed = drawn @ gold, drawn @ said
        terms = np.divide((observed - expected) ** 2, expected, out=np.zeros_like(expected), where=expected > 0)
        sizes = expected @ member
        with np.errstate(invalid="ignore"):
            return ((terms @ member) * sizes).sum(1) / sizes.sum(1) / 100

    return statistic, len(places)
