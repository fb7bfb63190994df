"""The paired comparison: exact p values, intervals, and what must not be compared."""

import json
import os
import random
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from scipy.stats import binomtest

from latent_jax import compare
from latent_jax.errors import UserError
from latent_jax.evaluation import paired


def write(directory, right, clusters=None, **changes):
    directory.mkdir()
    protocol = {"benchmark": "gqa", "split": "testdev", "scorer": "official", "scorer_version": 1, "prompt": "?"}
    (directory / "results.json").write_text(json.dumps({**protocol, "asked": len(right), **changes}))
    lines = [
        {"id": str(n), "reply": "", "cluster": str(clusters[n] if clusters else n), "correct": correct}
        for n, correct in enumerate(right)
    ]
    random.Random(len(directory.name)).shuffle(lines)
    (directory / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (0, 5), (1, 9), (9, 1), (7, 7), (3, 4), (150, 220), (0, 900)])
def test_mcnemar_is_the_exact_binomial_test(only_a, only_b):
    found = paired.mcnemar(only_a, only_b)
    expected = binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    assert found == pytest.approx(expected, rel=1e-9)


def test_mcnemar_by_hand():
    assert paired.mcnemar(1, 9) == float(Fraction(2 * (1 + 10), 1024))


def test_by_hand(tmp_path):
    """Of ten questions a has six, b eight; only a one, only b three."""
    a = write(tmp_path / "a", [1] * 6 + [0] * 4)
    b = write(tmp_path / "b", [1] * 5 + [0] + [1] * 3 + [0])
    found = paired.compare(a, b)
    assert (found["n"], found["clusters"], found["only_a"], found["only_b"]) == (10, 10, 1, 3)
    assert (found["a"], found["b"], found["difference"]) == (60, 80, 20)
    assert found["mcnemar"] == 0.625 and found["sign_flip"] is None
    # 10 draws of (+1: .3, -1: .1, 0: .6): standard deviation of the mean .19
    assert found["low"] == pytest.approx(-20, abs=10) and found["high"] == pytest.approx(60, abs=10)
    mirrored = paired.compare(b, a)
    assert (mirrored["difference"], mirrored["mcnemar"]) == (-20, 0.625)


def test_questions_that_share_an_image_are_no_evidence_of_their_own(tmp_path):
    """Four images of eight questions on which b is better: one in eight sign patterns is as extreme."""
    clusters = [n // 8 for n in range(32)]
    found = paired.compare(write(tmp_path / "a", [0] * 32, clusters), write(tmp_path / "b", [1] * 32, clusters))
    assert found["mcnemar"] < 1e-8
    assert found["sign_flip"] == pytest.approx(1 / 8, abs=0.01)
    assert (found["low"], found["high"]) == (100, 100)


def test_images_with_more_questions_weigh_more(tmp_path):
    """Where every question gains the same, every resample of images of any size does."""
    clusters = [n for n in range(8) for _ in range(n + 1)]
    found = paired.compare(write(tmp_path / "a", [0] * 36, clusters), write(tmp_path / "b", [1] * 36, clusters))
    assert (found["low"], found["difference"], found["high"]) == (100, 100, 100)


def test_sign_flip_against_every_pattern(tmp_path):
    rng = random.Random(1)
    clusters = [rng.randrange(8) for _ in range(60)]
    right = [[int(rng.random() < chance) for _ in range(60)] for chance in (0.4, 0.6)]
    a, b = (write(tmp_path / name, its, clusters) for name, its in zip("ab", right, strict=True))
    gains = [sum(y - x for x, y, its in zip(*right, clusters, strict=True) if its == c) for c in range(8)]
    patterns = [abs(np.dot(signs, gains)) >= abs(sum(gains)) for signs in product((-1, 1), repeat=8)]
    assert paired.compare(a, b)["sign_flip"] == pytest.approx(np.mean(patterns), abs=0.02)


def test_interval_covers_a_true_difference_of_clustered_questions():
    rng, inside = np.random.default_rng(0), 0
    for _ in range(60):
        gain = rng.normal(0.3, 1.0, 80)
        low, high = np.quantile(paired._bootstrap(gain, np.full(80, 5), 0), [0.025, 0.975])
        inside += low <= 0.3 / 5 <= high
    assert inside >= 53


def test_hidden_answers_are_left_out(tmp_path):
    a, b = write(tmp_path / "a", [1, None, 0]), write(tmp_path / "b", [1, None, 1])
    assert paired.compare(a, b)["n"] == 2
    with pytest.raises(UserError, match="no answer could be scored"):
        paired.compare(write(tmp_path / "c", [None]), write(tmp_path / "d", [None]))


@pytest.mark.parametrize(
    ("right", "changes", "message"),
    [
        ([1, 0], {"scorer": "lmms_eval"}, "scorer differs, 'official' in .* and 'lmms_eval' in"),
        ([1, 0], {"prompt": "!"}, "prompt differs"),
        ([1, 0, 1], {}, "1 questions stand in one of .* only, such as 2"),
        ([1, 0], {"asked": 3}, "is not of the 2 lines of predictions.jsonl beside it"),
    ],
)
def test_what_must_not_be_compared(right, changes, message, tmp_path):
    a, b = write(tmp_path / "a", [1, 0]), write(tmp_path / "b", right, **changes)
    with pytest.raises(UserError, match=message):
        paired.compare(a, b)


def test_the_command(tmp_path, capsys):
    a, b = write(tmp_path / "a", [1, 0], [0, 0]), write(tmp_path / "b", [1, 1], [0, 0])
    compare.main([f"--a={a}", f"--b={b}"])
    said = capsys.readouterr().out
    assert "b - a  +50.00 points, 95 % interval" in said and "sign-flip test over clusters" in said
    with pytest.raises(SystemExit) as end:
        compare.main([f"--a={tmp_path}", f"--b={b}"])
    assert end.value.code == 2 and "predictions.jsonl: no such file" in capsys.readouterr().err


def spoil(directory, number, **changes):
    file = directory / "predictions.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    by_id = {line["id"]: line for line in lines}
    by_id[str(number)].update(changes)
    for key in [key for key, value in changes.items() if value is ...]:
        del by_id[str(number)][key]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize("value", ["yes", 2, [1], [1, 2], float("nan"), {}, ...])
def test_a_verdict_that_is_none_is_no_right_answer(value, tmp_path):
    a, b = write(tmp_path / "a", [1, 0]), write(tmp_path / "b", [1, 0])
    spoil(b, 1, correct=value)
    with pytest.raises(UserError, match=r"b/predictions\.jsonl:\d: correct is .*, expected true, false or null"):
        paired.compare(a, b)


@pytest.mark.parametrize("key", ["prompt", "answer", "cluster"])
def test_questions_of_other_files_are_not_compared(key, tmp_path):
    a, b = write(tmp_path / "a", [1, 0]), write(tmp_path / "b", [1, 0])
    spoil(b, 1, **{key: "other"})
    with pytest.raises(
        UserError, match=rf"predictions\.jsonl: question 1 has {key} 'other', and .* not asked the same"
    ):
        paired.compare(a, b)


def test_a_question_that_one_side_hides_is_not_wrong_there(tmp_path):
    a, b = write(tmp_path / "a", [1, 0]), write(tmp_path / "b", [1, None])
    with pytest.raises(UserError, match="question 1 is scored in one of .* and .* only"):
        paired.compare(a, b)


def test_a_question_that_stands_twice_is_named(tmp_path):
    a, b = write(tmp_path / "a", [1, 0]), write(tmp_path / "b", [1, 0])
    spoil(b, 1, id="0")
    with pytest.raises(UserError, match=r"b/predictions\.jsonl:2: question 0 stands here a second time"):
        paired.compare(a, b)


@pytest.mark.parametrize("changes", [{"n": 1}, {"unparsed": 1}, {"predictions": "of others"}, {"asked": True}])
def test_results_of_other_replies_are_not_compared(changes, tmp_path):
    a, b = write(tmp_path / "a", [1, 0]), write(tmp_path / "b", [1, 0], **changes)
    with pytest.raises(UserError, match=rf"b/results\.json: is not of the 2 lines .* \({next(iter(changes))} is"):
        paired.compare(a, b)


def test_what_cannot_be_read_to_an_end_is_not_read(tmp_path):
    a, b = write(tmp_path / "a", [1, 0]), write(tmp_path / "b", [1, 0])
    (b / "predictions.jsonl").unlink()
    os.mkfifo(b / "predictions.jsonl")
    with pytest.raises(UserError, match=r"b/predictions\.jsonl: not a regular file"):
        paired.compare(a, b)


def test_a_seed_below_zero_is_refused(tmp_path):
    with pytest.raises(UserError, match="seed: got -1"):
        paired.compare(write(tmp_path / "a", [1]), write(tmp_path / "b", [1]), seed=-1)
