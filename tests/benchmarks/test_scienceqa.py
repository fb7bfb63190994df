"""ScienceQA's scorer: replies by hand, and the report's nine numbers against the reference."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latent_jax.benchmarks import scienceqa
from tests.benchmarks.asked import percent, row, values
from tests.reference import scorers
from tests.reference.replies import ADVERSARIAL, CHOICES, replies

OFFICIAL = {
    **dict.fromkeys(["A", " A ", "A. A.", "A. B.", "A. because", "The answer is A.", "The answer is A red ball"], "A"),
    **dict.fromkeys(["The answer is A dog"], "A"),  # the official pattern has no eye for articles
    "\nB\n": "B",
    "B": "B",
}
LMMS_EVAL = {
    **dict.fromkeys(["A", "a", " A ", "A.", "A..", "A. A.", "A. B.", "A.\nB.", "A. because", "A.because"], "A"),
    "A.M. is earlier": "A",
    **dict.fromkeys(["B", "b", "\nB\n"], "B"),
}


@pytest.mark.parametrize(("scorer", "expected"), [("official", OFFICIAL), ("lmms_eval", LMMS_EVAL)])
def test_by_hand(scorer, expected):
    question = {"choices": CHOICES}
    assert {reply: parsed for reply in ADVERSARIAL if (parsed := scienceqa.parse(reply, question, scorer))} == expected


@given(replies(), st.integers(2, 4), st.sampled_from(scienceqa.SCORERS))
def test_as_the_reference_reads(reply, count, scorer):
    question = {"choices": CHOICES[:count]}
    place = scorers.scienceqa_letter(question, reply, scorer)
    assert scienceqa.parse(reply, question, scorer) == (None if place is None else scorers.LETTERS[place])


PHRASES = ["The answer is ", "The answer is", "the answer is ", "A", "B", "C", "E", "AA", ".", ". ", " ", "\n", "F"]


@given(st.lists(st.sampled_from(PHRASES), max_size=8).map("".join), st.integers(2, 5))
def test_the_official_phrase_as_the_reference_reads(reply, count):
    """Phrases that run into each other: what stands behind a letter is part of its phrase."""
    question = {"choices": list("vwxyz")[:count]}
    place = scorers.scienceqa_letter(question, reply, "official")
    assert scienceqa.parse(reply, question, "official") == (None if place is None else scorers.LETTERS[place])


@pytest.mark.parametrize(
    ("reply", "count", "expected"),
    [
        ("The answer is AThe answer is AA", 4, "A"),
        ("The answer is A", 4, None),
        ("The answer is A\n", 4, None),
        ("The answer is A. The answer is A.", 4, None),
        ("C. The answer is A.", 4, "C"),
        ("C. The answer is A.", 2, None),  # C is one of the official options, so nothing behind it is read
        ("F. The answer is A.", 4, "A"),
        ("A.", 4, None),
    ],
)
def test_the_official_reading_by_hand(reply, count, expected):
    assert scienceqa.parse(reply, {"choices": list("wxyz")[:count]}, "official") == expected


def problem(rng: random.Random, number: int) -> dict:
    return {
        "id": str(number),
        "question": "Which?",
        "choices": CHOICES[: rng.randrange(2, 5)],
        "answer": rng.randrange(2),
        "hint": rng.choice(["", "Look closely."]),
        "subject": rng.choice(list(scienceqa.SUBJECTS.values())),
        "grade": f"grade{rng.randrange(1, 13)}",
    }


@pytest.mark.parametrize("scorer", scienceqa.SCORERS)
def test_the_report_equals_the_reference(scorer):
    rng = random.Random(3)
    asked = [(problem(rng, n), rng.random() < 0.5, rng.choice([*ADVERSARIAL, *"AB" * 60])) for n in range(150)]
    found = scienceqa.report([row(scienceqa, q, r, scorer, images=int(image)) for q, image, r in asked], scorer)
    assert values(found) == percent(scorers.scienceqa(asked, scorer))
    assert list(found) == ["NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12", "Avg"]


def test_prompt():
    question = {"question": "Which is red?", "choices": ["ball", "cube"], "hint": ""}
    asked = "Which is red?\nA. ball\nB. cube\nAnswer with the option's letter from the given choices directly."
    assert scienceqa.prompt(question, "lmms_eval") == asked
    assert scienceqa.prompt({**question, "hint": "Look."}, "lmms_eval") == f"Context: Look.\n{asked}"


def test_an_answer_outside_the_choices():
    question = problem(random.Random(0), 1)
    for answer in (-1, len(question["choices"])):
        with pytest.raises(ValueError, match=f"its answer {answer} is not one of the"):
            scienceqa.check({**question, "answer": answer}, 0)
    with pytest.raises(ValueError, match="'answer' is True, expected an integer"):
        scienceqa.check({**question, "answer": True}, 0)


def test_more_choices_than_letters():
    question = {**problem(random.Random(0), 1), "choices": [str(n) for n in range(27)]}
    with pytest.raises(ValueError, match="'choices' has 27 texts, expected at most 26"):
        scienceqa.check(question, 0)
    question["choices"].pop()
    scienceqa.check(question, 0)
    assert scienceqa.prompt(question, "official").splitlines()[-2] == "Z. 25"


def test_the_official_results_file():
    rows = [row(scienceqa, problem(random.Random(0), n), reply, "official") for n, reply in enumerate(["B", "none"])]
    assert scienceqa.submission(rows) == ("scienceqa_results.json", {"results": {"0": 1, "1": -1}})
