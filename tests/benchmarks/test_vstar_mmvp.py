"""V* and MMVP: replies by hand, categories and pairs against the reference."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latent_jax.benchmarks import mmvp, vstar
from tests.benchmarks.asked import row, values
from tests.benchmarks.test_letters import ANNOUNCED, LEADING
from tests.reference import scorers
from tests.reference.replies import ADVERSARIAL, CHOICES, replies

VSTAR = {"question": "What is it?", "choices": CHOICES, "answer": "A", "category": "direct_attributes"}
MMVP = {"question": "Which?", "options": "(a) red ball (b) blue cube", "answer": "(a)"}
# Neither at the beginning nor announced, but the only letter in parentheses.
MARKED = {
    **dict.fromkeys(["((A))", "not (A)"], "A"),
    **dict.fromkeys(["x\n\n(B)", "The answer is (B)."], "B"),
    **dict.fromkeys(["I think it is (C), the green one", "The correct choice is: (c)"], "C"),
    **dict.fromkeys(["Definitely (D)", "the answer is\n(D)"], "D"),
}


@pytest.mark.parametrize(("scorer", "expected"), [("official", {}), ("lmms_eval", ANNOUNCED)])
def test_vstar_by_hand(scorer, expected):
    found = {reply: parsed for reply in ADVERSARIAL if (parsed := vstar.parse(reply, VSTAR, scorer))}
    # lmms-eval takes the A of "Answer" and the C of "Choice" for the letter that a reply begins with.
    begins = {"Answer: B", "answer:B", "Choice D.", "answer is: C)"} if scorer == "lmms_eval" else set()
    expected = {**MARKED, **expected, **LEADING}
    assert found == {reply: letter for reply, letter in expected.items() if reply not in begins}


@given(replies(), st.sampled_from(vstar.SCORERS))
def test_both_as_the_reference_reads(reply, scorer):
    place = scorers.one_of_two_letters(reply, CHOICES, scorer)
    assert vstar.parse(reply, VSTAR, scorer) == (None if place is None else "ABCD"[place])
    place = scorers.one_of_two_letters(reply, CHOICES[:2], scorer)
    assert mmvp.parse(reply, MMVP, scorer) == (None if place is None else ["(a)", "(b)"][place])


@pytest.mark.parametrize("scorer", vstar.SCORERS)
def test_vstar_categories(scorer):
    rng = random.Random(2)
    asked = [
        (
            {**VSTAR, "id": str(n), "category": rng.choice(vstar.CATEGORIES), "answer": rng.choice("AB")},
            rng.choice(ADVERSARIAL),
        )
        for n in range(90)
    ]
    right = [
        (q["category"], scorers.one_of_two_letters(r, CHOICES, scorer) == "ABCD".index(q["answer"])) for q, r in asked
    ]
    expected = {name: 100 * scorers.share(ok for its, ok in right if its == name) for name in vstar.CATEGORIES}
    found = vstar.report([row(vstar, q, r, scorer) for q, r in asked], scorer)
    assert values(found) == {**expected, "overall": 100 * scorers.share(ok for _, ok in right)}


def test_vstar_prompts():
    """The official one as test_questions.jsonl writes it."""
    two, end = {**VSTAR, "choices": CHOICES[:2]}, "Answer with the option's letter from the given choices directly."
    assert vstar.prompt(two, "official") == f"What is it?\n(A) red ball\n(B) blue cube\n{end}"
    assert vstar.prompt(two, "lmms_eval") == f"What is it?\nA. red ball\nB. blue cube\n{end}"
    published = {**two, "text": f"What is it?\n(A) red ball\n(B) blue cube\n{end}"}
    assert vstar.prompt(published, "lmms_eval") == f"What is it?\nA. red ball\nB. blue cube\n{end}\n{end}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": "E"}, "'E' is not one of A, B, C, D"),
        ({"choices": ["x"]}, "at least 2 texts"),
        ({"category": "x"}, "'x'"),
    ],
)
def test_vstar_broken_questions(change, message):
    with pytest.raises(ValueError, match=message):
        vstar.check({**VSTAR, **change}, 1)


@pytest.mark.parametrize("scorer", mmvp.SCORERS)
def test_mmvp_pairs_equal_the_reference(scorer):
    rng = random.Random(4)
    asked = [
        ({**MMVP, "id": str(n), "answer": rng.choice(["(a)", "(b)"])}, rng.choice(["(a)", "B", *ADVERSARIAL[:40]]))
        for n in range(1, 121)
    ]
    names = {None: "", 0: "(a)", 1: "(b)"}
    right = [names[scorers.one_of_two_letters(r, CHOICES[:2], scorer)] == q["answer"] for q, r in asked]
    rows = [row(mmvp, q, r, scorer) for q, r in asked]
    rng.shuffle(rows)
    pairs = [right[n] and right[n + 1] for n in range(0, 120, 2)]
    assert any(pairs) and sum(pairs) < sum(right) / 2
    assert values(mmvp.report(rows, scorer)) == {
        "questions": 100 * scorers.share(right),
        "pairs": 100 * scorers.share(pairs),
    }


def test_mmvp_half_a_pair_is_no_pair():
    rows = [row(mmvp, {**MMVP, "id": name}, "a", "official") for name in ("1", "2", "3")]
    assert mmvp.report(rows, "official")["pairs"].n == 1


def test_mmvp_prompts():
    end = "\nAnswer with the option's letter from the given choices directly."
    assert mmvp.prompt(MMVP, "official") == f"Which? (a) red ball (b) blue cube{end}"
    assert mmvp.prompt(MMVP, "lmms_eval") == f"Which?\nA. red ball\nB. blue cube{end}"


@pytest.mark.parametrize(
    ("change", "message"),
    [({"answer": "(c)"}, r"'\(c\)' is not one of"), ({"options": "(a) x"}, "its options are"), ({"id": "1b"}, "'1b'")],
)
def test_mmvp_broken_questions(change, message):
    with pytest.raises(ValueError, match=message):
        mmvp.check({**MMVP, "id": "1", **change}, 1)
