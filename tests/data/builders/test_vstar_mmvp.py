"""V* Bench and MMVP as published, and broken."""

import json

import pytest
from data.builders.official import picture, records, run, skipped

from latent_jax.data.builders.files import read_json_lines
from latent_jax.data.builders.tally import Tally


def vstar(root, count=30):
    """test_questions.jsonl and, beside each image, its annotation, whose first option is the right one."""
    lines = []
    for i in range(count):
        category = ("direct_attributes", "relative_position")[i % 2]
        options = ["red", "blue", "green", "white"] if i % 2 == 0 else ["left", "right"]
        right = i % len(options)
        (root / category).mkdir(parents=True, exist_ok=True)
        (root / category / f"sa_{i}.jpg").write_bytes(picture(i))
        sentences = [options[right], *(option for option in options if option != options[right])]
        annotation = {
            "target_object": [f"thing {i}"],
            "bbox": [[i, 2, 3, 4]],
            "question": f"What about thing {i}?",
            "options": [f"It is {option}." for option in sentences],
        }
        (root / category / f"sa_{i}.json").write_text(json.dumps(annotation))
        listed = "\n".join(f"({'ABCD'[k]}) {option}" for k, option in enumerate(options))
        told = "Answer with the option's letter from the given choices directly."
        lines.append(
            {
                "image": f"{category}/sa_{i}.jpg",
                "text": f"What about thing {i}?\n{listed}\n{told}",
                "category": category,
                "label": "ABCD"[right],
                "question_id": i,
            }
        )
    save(root, lines)
    return lines


def save(root, lines):
    (root / "test_questions.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def test_vstar_as_published(tmp_path, capsys):
    lines = vstar(tmp_path / "raw")
    status, err = run(capsys, "vstar", tmp_path / "raw", tmp_path / "out")
    assert status == 0 and ": skipped" not in err and "30 records, where the published split has 191" in err
    found = records("vstar", tmp_path / "out", "test")
    assert list(found) == [str(i) for i in range(30)]
    assert found["6"] == {
        "key": "6",
        "images": [picture(6)],
        "captions": [],
        "questions": [
            {
                "id": "6",
                "question": "What about thing 6?",
                "choices": ["red", "blue", "green", "white"],
                "answer": "C",
                "category": "direct_attributes",
                "text": lines[6]["text"],
                "target_object": ["thing 6"],
                "bbox": [[6, 2, 3, 4]],
            }
        ],
    }
    assert found["7"]["questions"][0]["choices"] == ["left", "right"]


def test_vstar_from_its_folders_alone(tmp_path, capsys):
    """The annotation's first option is right: it must not always come first."""
    vstar(tmp_path / "raw")
    (tmp_path / "raw" / "test_questions.jsonl").unlink()
    assert run(capsys, "vstar", tmp_path / "raw", tmp_path / "out")[0] == 0
    found = records("vstar", tmp_path / "out", "test")
    answers = []
    for key, record in found.items():
        (question,) = record["questions"]
        annotation = json.loads((tmp_path / "raw" / f"{key}.json").read_text())
        assert sorted(question["choices"]) == sorted(annotation["options"])
        assert question["choices"]["ABCD".index(question["answer"])] == annotation["options"][0]
        assert record["images"] == [(tmp_path / "raw" / f"{key}.jpg").read_bytes()]
        answers.append(question["answer"])
    assert len(found) == 30 and set(answers) == set("ABCD")
    assert run(capsys, "vstar", tmp_path / "raw", tmp_path / "again")[0] == 0
    assert records("vstar", tmp_path / "again", "test") == found


VSTAR = {
    "label outside the options": (lambda line: line.update(label="E"), "label 'E' is not among the options A, B, C, D"),
    "no options": (lambda line: line.update(text="What?"), "text has no options (A) ..., (B) ..."),
    "missing image": (lambda line: line.update(image="direct_attributes/none.jpg"), "none.jpg: no such image file"),
    "no text": (lambda line: line.pop("text"), "expected text, image, label, category and question_id, got image"),
    "the same question again": (lambda line: line.update(question_id=2), "question 2 comes twice"),
}


@pytest.mark.parametrize("kind", VSTAR)
def test_vstar_with_a_broken_line(tmp_path, capsys, kind):
    lines = vstar(tmp_path / "raw")
    breaks, said = VSTAR[kind]
    breaks(lines[4])
    save(tmp_path / "raw", lines)
    status, err = run(capsys, "vstar", tmp_path / "raw", tmp_path / "out")
    assert status == 0 and "test: skipped 1 of 30 questions\n" in err and said in err
    assert list(records("vstar", tmp_path / "out", "test")) == [str(i) for i in range(30) if i != 4]


def test_vstar_with_a_line_that_is_none(tmp_path, capsys):
    vstar(tmp_path / "raw")
    file = tmp_path / "raw" / "test_questions.jsonl"
    file.write_text(file.read_text() + '{"image": "direct\n\n')
    status, err = run(capsys, "vstar", tmp_path / "raw", tmp_path / "out")
    assert status == 0 and "skipped 1 of 31 questions" in err and "line 31: expected an object, but it cannot" in err
    file.write_text("")
    status, err = run(capsys, "vstar", tmp_path / "raw", tmp_path / "none")
    assert status == 2 and "expected an object a line, found none" in err


HEADER = "Index,Question,Options,Correct Answer\n"


def mmvp(root, count=30):
    (root / "MMVP Images").mkdir(parents=True)
    lines = []
    for i in range(1, count + 1):
        (root / "MMVP Images" / f"{i}.jpg").write_bytes(picture(i))
        lines.append(f'{i},"Are they open, or closed, in {i}?",(a) Open (b) Closed again,({"ba"[i % 2]})\n')
    (root / "Questions.csv").write_text("\ufeff" + HEADER + "".join(lines))
    return lines


def test_mmvp_as_published(tmp_path, capsys):
    mmvp(tmp_path / "raw")
    status, err = run(capsys, "mmvp", tmp_path / "raw", tmp_path / "out")
    assert status == 0 and ": skipped" not in err and "30 records, where the published split has 300" in err
    found = records("mmvp", tmp_path / "out", "test")
    assert list(found) == [str(i) for i in range(1, 31)]
    assert found["5"]["images"] == [picture(5)]
    assert found["5"]["questions"] == [
        {
            "id": "5",
            "question": "Are they open, or closed, in 5?",
            "options": "(a) Open (b) Closed again",
            "choices": ["Open", "Closed again"],
            "answer": "(a)",
        }
    ]


MMVP = {
    "answer outside the options": ("5,Q?,(a) Open (b) Closed,(c)\n", "Correct Answer '(c)' is not among"),
    "no options": ("5,Q?,Open or closed,(a)\n", "Options 'Open or closed', expected"),
    "no question": ("5,,(a) Open (b) Closed,(a)\n", "no Index or no Question"),
    "a short row": ("5,Q?\n", "Options '', expected"),
}


@pytest.mark.parametrize("kind", MMVP)
def test_mmvp_with_a_broken_row(tmp_path, capsys, kind):
    lines = mmvp(tmp_path / "raw")
    lines[4], said = MMVP[kind]
    (tmp_path / "raw" / "Questions.csv").write_text(HEADER + "".join(lines))
    status, err = run(capsys, "mmvp", tmp_path / "raw", tmp_path / "out")
    assert status == 0 and "test: skipped 1 of 30 questions\n" in err and "row 5: " in err and said in err
    assert "questions that have lost the other one of their pair: 6" in err
    assert len(records("mmvp", tmp_path / "out", "test")) == 29


def test_mmvp_broken_otherwise(tmp_path, capsys):
    lines = mmvp(tmp_path / "raw")
    (tmp_path / "raw" / "MMVP Images" / "7.jpg").unlink()
    (tmp_path / "raw" / "Questions.csv").write_text(HEADER + "".join([*lines, lines[8]]))
    status, err = run(capsys, "mmvp", tmp_path / "raw", tmp_path / "out", "--max_bad=0.1")
    assert status == 0 and "7.jpg: no such image file" in err and "question 9 comes twice" in err
    assert [line["records"] for line in skipped(tmp_path / "out")] == [1, 1]
    (tmp_path / "raw" / "Questions.csv").write_text("lndex,Question,Options,Answer\n" + "".join(lines))
    status, err = run(capsys, "mmvp", tmp_path / "raw", tmp_path / "other")
    assert status == 2 and "expected columns Index, Question, Options, Correct Answer, but 'Index' is not there" in err


def test_a_line_separator_inside_a_text_ends_no_line(tmp_path):
    """JSON may hold U+2028 and U+0085 as they are; Python's splitlines would cut there."""
    file, tally = tmp_path / "lines.jsonl", Tally("lines")
    file.write_bytes('\ufeff{"a": "x\u2028y\x85z"}\r\n\r\n{"a": 1}'.encode())
    assert read_json_lines(file, "question", tally) == [(1, {"a": "x\u2028y\x85z"}), (3, {"a": 1})]
