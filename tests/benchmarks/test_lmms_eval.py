"""What lmms-eval reads: by hand, and against a reader that was written from the rules in another way."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from latent_jax.benchmarks import lmms_eval
from tests.reference import lmms_letters
from tests.reference.replies import replies

READERS = ("blink", "vstar", "mmvp")
# Pieces of the rules' own words: replies that nearly follow one of them.
PIECES = [
    "answer", "Answer", "choice", "OPTION", "is", " is", "is ", " ", "\n", "\t", "\u00a0", ":", ": ", "(", ")", ".",
    "]", "|", "*", "A", "B", "C", "D", "E", "a", "b", "the ", "grab", "x",
]  # fmt: skip
NEARLY = st.lists(st.sampled_from(PIECES), max_size=10).map("".join)

# (reply, BLINK, V*, MMVP); None: no letter.
BY_HAND = [
    ("B", "B", "B", "B"), ("(b)", "B", "B", "B"), ("b.", "B", "B", "B"), ("", None, None, None),
    ("The second", "T", None, None), ("Because", "B", "B", "B"), ("**B**", None, "B", None), ("(( B", "B", "B", "B"),
    ("The answer is (B).", "T", "B", "B"), ("The answer is B", "T", "B", "B"), ("It is C.", "I", "C", None),
    ("The option is: D", "T", "D", None), ("The choice B", "T", "B", "B"), ("In the cab", "I", None, "B"),
    ("x|B|", "X", "B", None), ("B|A", "B", "B", "A"), ("x A| B]", "X", "B", None), ("E) or A)", "E", "A", "A"),
    ("Option (A)", "O", "A", "A"), ("answer is: A", "A", "A", "A"), ("It is red (A) or (B)", "I", "A", "A"),
]  # fmt: skip


@pytest.mark.parametrize(("reply", "blink", "vstar", "mmvp"), BY_HAND)
def test_by_hand(reply, blink, vstar, mmvp):
    assert (lmms_eval.blink(reply), lmms_eval.vstar(reply), lmms_eval.mmvp(reply)) == (blink, vstar, mmvp)


@pytest.mark.parametrize("name", READERS)
@given(reply=st.one_of(NEARLY, replies()))
@example(reply="A|")
def test_as_the_reference_reads(name, reply):
    assert (getattr(lmms_eval, name)(reply) or "") == getattr(lmms_letters, name)(reply)


MARKS = ["(A)", "(B)", "(C)", "(D)", "(E)", "(a)", "(", ")", " ", "\n", "red", "What?", "Answer directly."]


@given(st.lists(st.sampled_from(MARKS), max_size=10).map("".join))
def test_the_text_of_a_question_as_the_reference_writes_it(text):
    assert lmms_eval.vstar_text(text) == lmms_letters.vstar_text(text)


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("What?\n(A) red\n(B) blue\nAnswer.", ["What?", "A. red", "B. blue\nAnswer."]),
        ("What? (A) dark (red) (B) blue", ["What?", "A. blue"]),  # theirs loses an option with parentheses in it
        ("What?", ["What?"]),
    ],
)
def test_texts_by_hand(text, lines):
    assert lmms_eval.vstar_text(text) == "\n".join(lines)
