"""Letters in replies: by hand, and against the slow reference on whatever models might say."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latent_jax.benchmarks import letters
from tests.reference import scorers
from tests.reference.replies import ADVERSARIAL, CHOICES, replies

# What a reply that begins with a letter names, decided by hand; all other adversarial replies name nothing.
LEADING = {
    **dict.fromkeys(["A", "a", "A.", "(A)", "(a)", "A)", "A:", "**A**", " A ", "(A).", "A. A."], "A"),
    **dict.fromkeys(["(A) (A)", "(A) or not (A)", "A red ball", "A. because", "A\u00a0red ball"], "A"),
    **dict.fromkeys(["B", "b", "**(B)** blue cube", "\nB\n", "B blue cube", "B the blue cube", "(B)\n\nx"], "B"),
    "D no ball at all": "D",
}
ANNOUNCED = {
    **dict.fromkeys(["The answer is A", "The answer is A.", "The answer is A.\nThe answer is A."], "A"),
    **dict.fromkeys(["The answer is (B).", "Answer: B", "answer:B", "The answer is B\nbecause"], "B"),
    **dict.fromkeys(["Option C", "The correct choice is: (c)", "answer is: C)"], "C"),
    **dict.fromkeys(["Choice D.", "the answer is\n(D)"], "D"),
    "The answer is A red ball": "A",
}


@pytest.mark.parametrize("reply", ADVERSARIAL)
def test_leading_by_hand(reply):
    assert letters.letter(letters.leading(reply, CHOICES)) == LEADING.get(reply)


@pytest.mark.parametrize("reply", ADVERSARIAL)
def test_announced_by_hand(reply):
    assert letters.letter(letters.announced(reply, CHOICES)) == ANNOUNCED.get(reply)


def test_the_list_is_long_and_its_expectations_are_of_it():
    assert len(ADVERSARIAL) == len(set(ADVERSARIAL)) >= 100
    assert (LEADING.keys() | ANNOUNCED.keys()) <= set(ADVERSARIAL)


@given(replies(), st.integers(2, 4))
def test_as_the_reference_reads(reply, count):
    choices = CHOICES[:count]
    assert letters.leading(reply, choices) == scorers.leading(reply, choices)
    assert letters.announced(reply, choices) == scorers.announced(reply, choices)
    for small in (True, False):
        assert letters.marked(reply, count, small=small) == scorers.parenthesised(reply, count, small)
        assert letters.only_marked(reply, choices, small=small) == scorers.only_parenthesised(reply, choices, small)


CLOSER = ["A is closer", "B is closer"]


@pytest.mark.parametrize("begun", ["B is closer than (A).", "B, not (A).", "B. (A) is wrong.", "B: not (A)", "B (A)"])
def test_a_letter_that_a_reply_begins_with_is_not_turned_into_the_other(begun):
    """None or B, never A, though (A) is the only letter in parentheses."""
    swapped = begun.translate(str.maketrans("AB", "BA"))
    for reply, other in ((begun, 0), (swapped, 1)):
        assert letters.only_marked(reply, CLOSER) is None and letters.leading(reply, CLOSER) != other
    assert letters.only_marked("A possible answer is (B).", CHOICES) == 1  # the article


@given(replies())
def test_no_letter_is_made_of_a_word(reply):
    """A letter that is found stands in the reply as a whole word."""
    for place in (letters.leading(reply, CHOICES), letters.announced(reply, CHOICES)):
        if place is not None:
            words = "".join(c if c.isalnum() or c == "_" else " " for c in reply).split()
            assert letters.ALPHABET[place] in words or letters.ALPHABET[place].lower() in words
