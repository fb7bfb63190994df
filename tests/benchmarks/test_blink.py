"""BLINK's scorer: replies by hand, sub-tasks, macro and micro against the reference."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latent_jax.benchmarks import blink
from tests.benchmarks.asked import percent, row, values
from tests.benchmarks.test_letters import LEADING
from tests.reference import scorers
from tests.reference.replies import ADVERSARIAL, CHOICES, replies

# Where the official reading finds more than the reply's beginning, or something else.
OFFICIAL = {
    **dict.fromkeys(["((A))", "not (A)"], "A"),
    **dict.fromkeys(["x\n\n(B)", "(A)\n\nso (B)"], "B"),
    **dict.fromkeys(["(A) or (B)\n\n(C)", "I think it is (C), the green one"], "C"),
    **dict.fromkeys(["Definitely (D)", "the answer is\n(D)"], "D"),
    "The answer is (B).": "B",
}


# lmms-eval has no eye for markup.
LMMS_EVAL = {reply: letter for reply, letter in LEADING.items() if not reply.startswith("**")}


@pytest.mark.parametrize(("scorer", "expected"), [("official", {**LEADING, **OFFICIAL}), ("lmms_eval", LMMS_EVAL)])
def test_by_hand(scorer, expected):
    question = {"choices": CHOICES}
    found = {reply: parsed for reply in ADVERSARIAL if (parsed := blink.parse(reply, question, scorer))}
    assert found == {reply: f"({letter})" for reply, letter in expected.items()}


@given(replies(), st.integers(2, 4), st.sampled_from(blink.SCORERS))
def test_as_the_reference_reads(reply, count, scorer):
    question = {"choices": CHOICES[:count]}
    place = scorers.blink_letter(question, reply, scorer)
    assert blink.parse(reply, question, scorer) == (None if place is None else f"({scorers.LETTERS[place]})")


def asked(number: int, task: str, answer: str = "(A)", count: int = 4) -> dict:
    return {
        "id": f"val_{task}_{number}",
        "question": "Which?",
        "sub_task": task,
        "choices": CHOICES[:count],
        "answer": answer,
        "prompt": "Which?\n(A) ...",
    }


@pytest.mark.parametrize("scorer", blink.SCORERS)
def test_macro_and_micro_equal_the_reference(scorer):
    rng = random.Random(5)
    tasks = rng.choices(blink.TASKS[:9], weights=range(1, 10), k=160)  # of very different sizes
    questions = [asked(n, task, rng.choice(["(A)", "(B)"])) for n, task in enumerate(tasks)]
    said = [rng.choice([*ADVERSARIAL, *["A", "(B)"] * 60]) for _ in questions]
    found = blink.report([row(blink, q, r, scorer) for q, r in zip(questions, said, strict=True)], scorer)
    assert values(found) == percent(scorers.blink(list(zip(questions, said, strict=True)), scorer))
    assert list(found)[-2:] == ["macro", "micro"] and found["macro"].value != found["micro"].value


def test_jigsaw_by_hand():
    """Three of four right: 75 %; Wilson's interval for 3 of 4 is .3006 to .9544."""
    rows = [row(blink, asked(n, "Jigsaw", count=2), "A" if n else "B", "official") for n in range(4)]
    found = blink.report(rows, "official")
    assert values(found) == {"Jigsaw": 75, "macro": 75, "micro": 75}
    assert found["Jigsaw"].half_width == pytest.approx(100 * (0.9544 - 0.3006) / 2, abs=0.01)


def test_prompt_of_lmms_eval_names_the_offered_letters():
    note = "Note: You only need to respond with A, B without providing any additional information.\n"
    assert blink.prompt(asked(1, "Jigsaw", count=2), "lmms_eval") == note + "Which?\n(A) ..."
    assert blink.prompt(asked(1, "Counting", count=2), "official") == "Which?\n(A) ..."


@pytest.mark.parametrize("task", ["Art_Style", "Forensic_Detection", "Jigsaw"])
def test_the_official_disclaimer(task):
    sent = blink.prompt(asked(1, task, count=2), "official")
    assert sent.startswith("Disclaimer: This is not to make") and sent.endswith("I gave you.\n\nWhich?\n(A) ...")
    assert "Disclaimer" not in blink.prompt(asked(1, task, count=2), "lmms_eval")


@pytest.mark.parametrize("scorer", blink.SCORERS)
@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("A is closer", "(A)"),
        ("A is closer.", "(A)"),
        ("B is closer to the camera.", "(B)"),
        ("a is closer", "(A)"),
        ("A is closer or B is closer", None),
        ("A is close", None),
    ],
)
def test_choices_that_hold_their_letter(reply, expected, scorer):
    assert blink.parse(reply, {"choices": ["A is closer", "B is closer"]}, scorer) == expected
    assert blink.parse(reply, {"choices": ["B is closer", "A is closer"]}, scorer) is None


def test_a_prompt_of_the_published_form_where_the_file_has_none():
    bare = {**asked(1, "Counting", count=2), "prompt": ""}
    form = "Which?\nSelect from the following choices.\n(A) red ball\n(B) blue cube"
    assert blink.prompt(bare, "official") == form
    assert blink.prompt(bare, "lmms_eval").endswith(f"information.\n{form}")


def test_hidden_answers():
    hidden = row(blink, asked(1, "Jigsaw", "hidden"), "(B)", "official")
    assert blink.answer(hidden.item.question) is None and hidden.correct is None
    assert blink.submission([hidden]) == ("blink_predictions.json", {"val_Jigsaw_1": "(B)"})


@pytest.mark.parametrize(
    ("change", "images", "message"),
    [
        ({"answer": "(C)"}, 1, r"its answer '\(C\)' is not one of \(A\), \(B\)"),
        ({"sub_task": "Jigsaws"}, 1, "its sub_task is 'Jigsaws'"),
        ({"choices": ["one"]}, 1, "expected a list of at least 2 texts"),
        ({}, 0, "has 0 images, expected 1 to 4"),
    ],
)
def test_broken_questions(change, images, message):
    with pytest.raises(ValueError, match=message):
        blink.check({**asked(1, "Jigsaw", count=2), **change}, images)
