"""One typed setting: what fits, what is said where it does not, and a command line's spelling."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_jax.config import fields
from latent_jax.errors import UserError


@pytest.mark.parametrize(
    ("annotation", "limits", "words"),
    [
        (int, {"low": 1}, "an integer >= 1"),
        (float, {"low": 0, "high": 1}, "a number in 0..1"),
        (float, {"above": 0, "high": 1}, "a number > 0 and <= 1"),
        (bool, {}, "true or false"),
        (str, {"choices": ("", "a")}, "one of '', a"),
        (tuple[int, ...], {}, "a tuple of integers"),
        (tuple[tuple[float, float], ...], {}, "a tuple of tuples"),
        (tuple[int, str], {}, "(an integer, a string)"),
        (int | None, {}, "an integer or none"),
        (float | tuple[float, ...], {}, "a number or a tuple of numbers"),
    ],
)
def test_expected_in_words(annotation, limits, words):
    assert fields.expected(annotation, limits) == words


@pytest.mark.parametrize(
    ("value", "annotation", "fitted"),
    [(3, float, 3.0), ([1, 2], tuple[int, ...], (1, 2)), (None, int | None, None), (2, float | tuple[float, ...], 2.0)],
)
def test_check_gives_the_annotated_type(value, annotation, fitted):
    got = fields.check("key", value, annotation, {})
    assert got == fitted and type(got) is type(fitted)


@pytest.mark.parametrize(
    ("value", "annotation"),
    [(1.0, int), (True, int), (1, bool), (1, str), (None, int), ("ab", tuple[str, ...]), ((1, "a"), tuple[int, ...])],
)
def test_check_refuses_other_types(value, annotation):
    with pytest.raises(UserError, match="key: got "):
        fields.check("key", value, annotation, {})


def test_limits_hold_inside_tuples():
    assert fields.check("key", (1, 2), tuple[int, ...], {"low": 1}) == (1, 2)
    with pytest.raises(UserError, match=r"got \(1, 0\), expected a tuple of integers >= 1"):
        fields.check("key", (1, 0), tuple[int, ...], {"low": 1})


@settings(max_examples=40, deadline=None)
@given(
    st.one_of(
        st.tuples(st.just(int), st.integers()),
        st.tuples(st.just(float), st.floats(allow_nan=False, allow_infinity=False, allow_subnormal=False, width=32)),
        st.tuples(st.just(bool), st.booleans()),
        st.tuples(st.just(str), st.text()),
        st.tuples(st.just(tuple[int, ...]), st.lists(st.integers()).map(tuple)),
        st.tuples(st.just(int | None), st.one_of(st.none(), st.integers())),
    )
)
def test_what_str_writes_parse_reads(pair):
    annotation, value = pair
    assert fields.parse("key", str(value), annotation, {}) == value


@pytest.mark.parametrize(
    ("text", "annotation", "value"),
    [
        ("TRUE", bool, True),
        ("0", bool, False),
        ("a,b", tuple[str, ...], ("a", "b")),
        ("3", tuple[int, ...], (3,)),
        ("(0.5, 1)", tuple[float, ...], (0.5, 1.0)),
        ("none", int | None, None),
    ],
)
def test_short_spellings(text, annotation, value):
    assert fields.parse("key", text, annotation, {}) == value


def test_a_float_is_one_that_float32_can_hold():
    limits = dict(low=0)
    for value in (0.0, 1e-37, 3.4e38, (1e-37, 0.0)):
        kind = tuple[float, ...] if isinstance(value, tuple) else float
        assert fields.check("key", value, kind, limits) == value
    for value, kind in ((1e-39, float), (3.5e38, float), (10**39, float), ((1.0, 1e-46), tuple[float, ...])):
        with pytest.raises(UserError, match="^key: got .*, which the float32 of a step cannot hold; expected a"):
            fields.check("key", value, kind, limits)
    assert fields.check("key", 1 - 2**-24, float, dict(below=1)) == 1 - 2**-24
    with pytest.raises(UserError, match="expected a number < 1$"):
        fields.check("key", 1 - 2**-26, float, dict(below=1))


def test_unknown_names_the_nearest_or_all():
    assert str(fields.unknown("config.stpes", "stpes", ["steps", "seed"])).endswith("did you mean 'steps'?")
    assert str(fields.unknown("config.zzz", "zzz", ["steps", "seed"])).endswith("known: seed, steps")


@pytest.mark.parametrize("points", [((0.5, 1.0), (0.0, 0.0)), ((0.0, 1.0), (0.0, 2.0))])
def test_points_must_ascend(points):
    points_type, limits = tuple[tuple[float, float], ...], {"ascending": True}
    with pytest.raises(UserError, match=r"key: got points at 0(.5)?, 0, expected each later than the one before"):
        fields.check("key", points, points_type, limits)
    for good in ((), ((0.5, 1.0),), ((0.0, 1.0), (0.5, 0.0))):
        assert fields.check("key", good, points_type, limits) == good
