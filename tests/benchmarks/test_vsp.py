"""VSP: plans walked on maps, by hand and against the reference."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latent_jax.benchmarks import vsp
from tests.benchmarks.asked import row, values
from tests.reference import scorers
from tests.reference.replies import ADVERSARIAL

BOARD = ["SFH", "FHF", "FFG"]
# reply -> (parsed, success, legal, strict)
BY_HAND = {
    "Action plan: D,D,R,R": ("D,D,R,R", 1, 1, 1),
    "First R. No.\nAction Plan: D, D, R, R.": ("D,D,R,R", 1, 1, 1),
    "Action plan: \"D\",'D',R,R\n": ("D,D,R,R", 1, 1, 1),
    "Action plan: D,D,R,R,R": (
        "D,D,R,R,R",
        1,
        1,
        0,
    ),  # after the goal nothing counts, but it is not the plan that was asked for
    "Action plan: D,D,R,R, and done": ("D,D,R,R,?", 1, 1, 0),
    "Action plan: U,D,D,R,R": ("U,D,D,R,R", 1, 1, 0),  # off the map: no effect
    "Action plan: L,L,L": ("L,L,L", 0, 1, 0),
    "Action plan: D,D,R": ("D,D,R", 0, 1, 0),
    "Action plan: R,D,D,R": ("R,D,D,R", 0, 0, 0),  # a hole
    "Action plan: R,R": ("R,R", 0, 0, 0),
    "Action plan: D,X,D,R,R": ("D,?", 0, 0, 0),
    "Action plan: d,d,r,r": ("?", 0, 0, 0),
    "Action plan: DDRR": ("?", 0, 0, 0),
    "Action plan: down, down, right, right": ("?", 0, 0, 0),
    "Action plan: D D R R": ("?", 0, 0, 0),
    "Action plan: D,,D,R,R": ("D,?", 0, 0, 0),
    "Action plan: D，D，R，R": ("?", 0, 0, 0),
    "Action plan: I cannot solve it.": ("?", 0, 0, 0),
    "Action plan:": (None, 0, 0, 0),
    "": (None, 0, 0, 0),
    "Action plan: R,R\nAction plan: D,D,R,R": ("R,?", 0, 0, 0),
    "Action plan: →,→": ("?", 0, 0, 0),
    "So \\boxed{R,R}? No: \\boxed{D,D,R,R}.": (None, 0, 0, 0),
    "\\boxed{D,D,R,R": (None, 0, 0, 0),
    "\\boxed{\\text{D,D}}": (None, 0, 0, 0),
    "\\boxed{}": (None, 0, 0, 0),
    "\\boxed{R,R} Action plan: D,D,R,R": ("D,D,R,R", 1, 1, 1),
    "D,D,R,R": (None, 0, 0, 0),  # no "Action plan: "
    "Action plan:D,D,R,R": (None, 0, 0, 0),
}


@pytest.mark.parametrize("reply", BY_HAND)
def test_by_hand(reply):
    parsed, *expected = BY_HAND[reply]
    assert vsp.parse(reply, {}, "official") == parsed
    assert vsp.walk(parsed, BOARD) == dict(zip(("success", "legal", "strict"), map(bool, expected), strict=True))


@pytest.mark.parametrize("reply", ADVERSARIAL)
def test_what_is_no_plan_goes_nowhere(reply):
    assert vsp.walk(vsp.parse(reply, {}, "official"), BOARD) == {
        "success": False,
        "legal": False,
        "strict": False,
    }


@pytest.mark.parametrize(
    ("reply", "parsed"),
    [
        ("So \\boxed{R,R}? No: \\boxed{D,D,R,R}.", "D,D,R,R"),
        ("\\boxed{D,D,R,R", None),
        ("\\boxed{\\text{D,D}}", None),
        ("\\boxed{}", None),
        ("Action plan: D", "D"),
    ],
)
def test_boxed_where_the_question_asks_for_it(reply, parsed):
    assert vsp.parse(reply, {"question": "Put the plan into \\boxed{}."}, "official") == parsed


def test_a_walk_ends_after_a_hundred_moves():
    there = "R,L," * 49
    assert vsp.walk(vsp.parse(f"Action plan: {there}D,R", {}, "official"), ["SF", "FG"])["success"]
    assert not vsp.walk(vsp.parse(f"Action plan: {there}R,L,R,L,D,R", {}, "official"), ["SF", "FG"])["success"]


boards = st.integers(2, 4).flatmap(
    lambda side: st.lists(st.sampled_from("FFFH"), min_size=side**2 - 2, max_size=side**2 - 2).flatmap(
        lambda cells: st.permutations([*cells, "S", "G"]).map(
            lambda mixed: ["".join(mixed[row * side : (row + 1) * side]) for row in range(side)]
        )
    )
)
plans = st.lists(st.sampled_from([*"LRUD" * 4, "x", " L ", "'U'", ""]), max_size=9).flatmap(
    lambda moves: st.sampled_from(["{}", "Action plan: {}", "so\nAction Plan:{}", "\\boxed{{R}} \\boxed{{{}}} so"]).map(
        lambda form: form.format(",".join(moves))
    )
)


@given(boards, plans)
def test_walks_equal_the_reference(board, reply):
    moves = scorers.vsp_moves(reply)
    parsed = vsp.parse(reply, {}, "official")
    assert (parsed.split(",") if parsed else []) == moves
    assert vsp.walk(parsed, board) == scorers.vsp_walk(board, moves)


def test_report():
    question = {"question": "Find a way.", "map": BOARD, "answer": "D,D,R,R"}
    rows = [row(vsp, {**question, "id": str(n)}, reply, "official") for n, reply in enumerate(BY_HAND)]
    expected = [100 * scorers.share(line[i] for line in BY_HAND.values()) for i in (1, 2, 3)]
    assert values(vsp.report(rows, "official")) == dict(zip(("success", "legal", "strict"), expected, strict=True))
    assert sum(r.correct for r in rows) == 7


def test_an_image_for_every_place():
    question = {"question": "The map: <image>", "map": BOARD}
    vsp.check(question, 1)
    for images in (0, 2):
        with pytest.raises(ValueError, match=f"has {images} images and 1 times <image>"):
            vsp.check(question, images)


def test_prompt_says_how_to_reply_once():
    assert vsp.prompt({"question": "Find a way."}, "official") == f"Find a way.\n{vsp.INSTRUCTION}"
    told = "Find a way. Put it in \\boxed{}."
    assert vsp.prompt({"question": told}, "official") == told


@pytest.mark.parametrize("board", [["SF", "FGF"], ["SX", "FG"], ["FF", "FG"], ["SS", "FG"], ["SF"], []])
def test_broken_maps(board):
    with pytest.raises(ValueError, match="'?map'? is"):
        vsp.check({"question": "?", "map": board}, 1)
