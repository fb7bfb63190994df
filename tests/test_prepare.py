"""The prepare command on official files as people have them: complete, with broken parts, and of another shape."""

import json

import pytest
from data.builders.official import coco_folder, picture, run, status_of, write_captions

from latent_jax import prepare
from latent_jax.data import scenes, sources


def gqa_folder(root, count=30):
    (root / "questions1.2").mkdir(parents=True)
    (root / "sceneGraphs").mkdir()
    (root / "images").mkdir()
    ids = [f"n{1000 + i}" if i % 3 == 0 else str(2370000 + i) for i in range(count)]
    questions = {}
    for i, image_id in enumerate(ids):
        (root / "images" / f"{image_id}.jpg").write_bytes(picture(i))
        for j in range(2):
            questions[f"0{i}{j}"] = {
                "question": f"Is it {j}?",
                "imageId": image_id,
                "answer": "yes",
                "isBalanced": True,
                "groups": {"global": None, "local": "x"},
            }
    (root / "questions1.2" / "val_balanced_questions.json").write_text(json.dumps(questions))
    bare = {"1": {"question": "Is it hidden?", "imageId": ids[0]}}
    (root / "questions1.2" / "test_balanced_questions.json").write_text(json.dumps(bare))
    (root / "sceneGraphs" / "val_sceneGraphs.json").write_text(json.dumps({ids[1]: {"width": 40, "objects": {}}}))
    return ids, questions


def test_coco_as_published(tmp_path, capsys):
    content = coco_folder(tmp_path / "raw")
    coco_folder(tmp_path / "raw", 3, "val2017")
    status, err = run(capsys, "coco_captions", tmp_path / "raw", tmp_path / "out")
    assert status == 0 and ": skipped" not in err and "40/40" in err
    source = sources.open_source("coco_captions", tmp_path / "out", "train")
    assert [record["key"] for record in source] == [str(image["id"]) for image in content["images"]]
    assert source[5] == {
        "key": "14",
        "images": [picture(14)],
        "captions": ["Caption 0 of 14.", "Caption 1 of 14."],
        "questions": [],
        "dataset": "coco_captions",
    }
    assert len(sources.open_source("coco_captions", tmp_path / "out", "validation")) == 3


def test_gqa_as_published(tmp_path, capsys):
    ids, questions = gqa_folder(tmp_path / "raw")
    status, err = run(capsys, "gqa", tmp_path / "raw", tmp_path / "out")
    assert status == 0 and "skipped" not in err
    source = sources.open_source("gqa", tmp_path / "out", "validation")
    assert [record["key"] for record in source] == ids
    assert source[1]["questions"] == [{"id": f"01{j}", **questions[f"01{j}"]} for j in range(2)]
    assert source[1]["scene_graph"] == {"width": 40, "objects": {}} and "scene_graph" not in source[2]
    (hidden,) = sources.open_source("gqa", tmp_path / "out", "test")
    assert hidden["questions"] == [{"id": "1", "answer": "", "question": "Is it hidden?", "imageId": ids[0]}]


def fourth(root, content):
    return root / "train2017" / content["images"][3]["file_name"]


BROKEN = {
    "missing image": lambda root, content: fourth(root, content).unlink(),
    "not an image": lambda root, content: fourth(root, content).write_bytes(b"<html>"),
    "half an image": lambda root, content: fourth(root, content).write_bytes(picture(12)[:400]),
    "empty caption": lambda root, content: content["annotations"][3].update(caption=" \n"),
    "no caption": lambda root, content: content["annotations"][3].pop("caption"),
    "unknown image": lambda root, content: content["annotations"][3].update(image_id=77777),
    "twice an image": lambda root, content: content["images"].append(content["images"][3]),
    "twice an annotation": lambda root, content: content["annotations"].append(content["annotations"][3]),
}
SAID = {
    "missing image": ("image", "000000000012.jpg: no such image file"),
    "not an image": ("image", "000000000012.jpg: not an image"),
    "half an image": ("image", "000000000012.jpg: not an image"),
    "empty caption": ("caption", "annotation 106 has an empty caption"),
    "no caption": ("caption", "an annotation without id, image_id or caption"),
    "unknown image": ("caption", "a caption of image 77777"),
    "twice an image": ("image", "image id 12 comes twice"),
    "twice an annotation": ("caption", "annotation id 106 comes twice"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_record_is_skipped_and_listed(tmp_path, capsys, kind):
    raw = tmp_path / "raw"
    content = coco_folder(raw)
    BROKEN[kind](raw, content)
    write_captions(raw, content)
    noun, said = SAID[kind]

    status, err = run(capsys, "coco_captions", raw, tmp_path / "out")
    assert status == 0
    total = len(content["images"] if noun == "image" else content["annotations"])
    assert f"train: skipped 1 of {total} {noun}s\n" in err and said in err
    records = {
        record["key"]: record["captions"] for record in sources.open_source("coco_captions", tmp_path / "out", "train")
    }
    captions = ["Caption 0 of 12.", "Caption 1 of 12."]
    kept = {
        "missing image": None,
        "not an image": None,
        "half an image": None,
        "twice an image": captions,
        "twice an annotation": captions,
    }
    assert records.get("12") == kept.get(kind, captions[1:])
    assert len(records) == 40 - (kept.get(kind, captions) is None)

    status, err = run(capsys, "coco_captions", raw, tmp_path / "strict", "--max_bad=0")
    assert status == 2 and not (tmp_path / "strict" / "coco_captions").exists()
    assert f"error: train: 1 of {total} {noun}s cannot be used" in err and said in err


def test_too_many_broken_images_is_an_error(tmp_path, capsys):
    raw = tmp_path / "raw"
    content = coco_folder(raw)
    for image in content["images"][:3]:
        (raw / "train2017" / image["file_name"]).unlink()
    status, err = run(capsys, "coco_captions", raw, tmp_path / "out")
    assert status == 2 and "3 of 40 images cannot be used, more than --max_bad=0.05 allows" in err
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".coco_captions.prepare"]  # what is done, is kept
    status, err = run(capsys, "coco_captions", raw, tmp_path / "out", "--max_bad=0.1")
    assert status == 0 and "skipped 3 of 40 images" in err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["coco_captions"]
    (skipped,) = (tmp_path / "out").rglob("skipped.jsonl")
    lines = list(map(json.loads, skipped.read_text().splitlines()))
    assert [(line["split"], line["kind"], line["records"]) for line in lines] == [("train", "image", 1)] * 3
    assert all("no such image file" in line["reason"] for line in lines)


CONTENTS = {
    "not JSON": ("{", "cannot be read as JSON"),
    "a list": ("[]", "got a list"),
    "no annotations": ('{"images": [{"id": 1, "file_name": "x.jpg"}]}', "'annotations' is missing"),
    "no captions": ('{"images": [{"id": 1, "file_name": "x.jpg"}], "annotations": []}', "'annotations' is empty"),
    "images a dict": (
        '{"images": {"1": 2}, "annotations": [{"id": 1, "image_id": 1, "caption": "x"}]}',
        "'images' is a dict",
    ),
    "an empty file": ("", "cannot be read as JSON"),
}


@pytest.mark.parametrize("kind", CONTENTS)
def test_a_file_of_another_shape_is_one_line(tmp_path, capsys, kind):
    (tmp_path / "raw" / "annotations").mkdir(parents=True)
    text, said = CONTENTS[kind]
    (tmp_path / "raw" / "annotations" / "captions_val2017.json").write_text(text)
    status, err = run(capsys, "coco_captions", tmp_path / "raw", tmp_path / "out")
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 2 and "captions_val2017.json: expected {" in line and said in line
    assert "Traceback" not in err and not (tmp_path / "out" / "coco_captions").exists()


def test_gqa_of_another_shape(tmp_path, capsys):
    (tmp_path / "questions").mkdir()
    file = tmp_path / "questions" / "train_balanced_questions.json"
    for text, said in (("{}", "it is empty"), ('[{"question": "x"}]', "got a list")):
        file.write_text(text)
        status, err = run(capsys, "gqa", tmp_path, tmp_path / "out")
        assert status == 2 and f"error: {file}: expected " in err and said in err


def test_gqa_with_broken_records(tmp_path, capsys):
    ids, questions = gqa_folder(tmp_path / "raw")
    (tmp_path / "raw" / "images" / f"{ids[4]}.jpg").unlink()
    questions["050"].update(question=" ")
    del questions["060"]["imageId"]
    (tmp_path / "raw" / "questions1.2" / "val_balanced_questions.json").write_text(json.dumps(questions))
    status, err = run(capsys, "gqa", tmp_path / "raw", tmp_path / "out")
    assert status == 0
    assert "validation: skipped 1 of 30 images\n" in err and f"{ids[4]}.jpg: no such image file" in err
    assert "validation: skipped 2 of 60 questions\n" in err
    assert "question 050 has no text" in err and "question 060 has no imageId" in err
    records = {
        record["key"]: [question["id"] for question in record["questions"]]
        for record in sources.open_source("gqa", tmp_path / "out", "validation")
    }
    assert records == {
        key: [f"0{i}{j}" for j in range(2) if f"0{i}{j}" not in ("050", "060")] for i, key in enumerate(ids) if i != 4
    }


def test_wrong_folders_and_flags(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for dataset in ("coco_captions", "gqa"):
        status, err = run(capsys, dataset, tmp_path / "nowhere", tmp_path / "out")
        assert status == 2 and f"error: {tmp_path / 'nowhere'}: no such folder" in err
        status, err = run(capsys, dataset, tmp_path / "empty", tmp_path / "out")
        assert status == 2 and f"error: {tmp_path / 'empty'}: no " in err
        assert status_of(f"--dataset={dataset}", f"--output={tmp_path / 'out'}") == 2
        assert "needs --raw=DIR" in capsys.readouterr().err
    coco_folder(tmp_path / "raw", 2)
    status, err = run(capsys, "coco_captions", tmp_path / "raw", tmp_path / "out", "--max_bad=7")
    assert status == 2 and "--max_bad=7.0: expected a share" in err
    coco_folder(tmp_path / "raw", 2, "train2014")
    status, err = run(capsys, "coco_captions", tmp_path / "raw", tmp_path / "out")
    assert status == 2 and "both are train" in err


def test_gqa_choices_and_repeated_keys(tmp_path, capsys):
    """Python's JSON reader would keep the last of two questions with one id, and say nothing."""
    _, questions = gqa_folder(tmp_path / "raw")
    file = tmp_path / "raw" / "questions1.2" / "val_balanced_questions.json"
    again = json.dumps({**questions["000"], "question": "Is it another?"})
    file.write_text(json.dumps(questions)[:-1] + f', "000": {again}}}')
    choices = {"valid": ["yes", "no"], "plausible": ["yes"]}
    (tmp_path / "raw" / "eval").mkdir()
    (tmp_path / "raw" / "eval" / "val_choices.json").write_text(json.dumps({"001": choices}))
    status, err = run(capsys, "gqa", tmp_path / "raw", tmp_path / "out")
    assert status == 0 and "validation: skipped 1 of 61 questions" in err and "question 000 comes twice" in err
    record = sources.open_source("gqa", tmp_path / "out", "validation")[0]
    assert record["questions"] == [
        {"id": "000", **questions["000"]},
        {"id": "001", **questions["001"], "choices": choices},
    ]


def test_an_existing_output_is_left_alone(tmp_path, capsys):
    coco_folder(tmp_path / "raw", 2)
    gqa_folder(tmp_path / "gqa", 2)
    assert run(capsys, "coco_captions", tmp_path / "raw", tmp_path / "out")[0] == 0
    assert run(capsys, "gqa", tmp_path / "gqa", tmp_path / "out")[0] == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    status, err = run(capsys, "coco_captions", tmp_path / "raw", tmp_path / "out")
    assert status == 2 and "already there" in err
    status, err = run(capsys, "scenes", "", tmp_path / "out", "--size=2")
    assert status == 2 and "already there" in err
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}


def test_scenes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(scenes, "SIZES", {"train": 9, "compositional": 2})
    flags = ["--dataset=scenes", f"--output={tmp_path / 'out'}", "--size=3", "--seed=4", "--placement=free"]
    assert prepare.main(flags) == 0
    assert capsys.readouterr().out == ""
    assert len(sources.open_source("scenes", tmp_path / "out", "train")) == 3
    record = sources.join(
        sources.open_source("scenes", tmp_path / "out", "compositional"),
        sources.open_source("scenes_questions", tmp_path / "out", "compositional"),
    )[0]
    assert record["captions"] and record["questions"]
    assert status_of("--dataset=scenes", f"--output={tmp_path / 'bad'}", "--striped=3") == 2
    assert "striped 3.0, expected" in capsys.readouterr().err and not (tmp_path / "bad").exists()
