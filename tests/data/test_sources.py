"""Sources give back what the official files say, from any thread, without TensorFlow."""

import concurrent.futures
import io
import json
import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from latent_jax.data import checks, scenes, sources
from latent_jax.data.builders.build import build, build_scenes
from latent_jax.errors import UserError

SIZES = {"train": 30, "validation": 9, "compositional": 3}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared") / "scenes"
    build_scenes(folder, seed=1, sizes=SIZES)
    return folder


def official(folder, split):
    """Records read straight from the official files, in their order."""
    coco = json.loads((folder / f"raw/coco/annotations/captions_{split}.json").read_text())
    questions = json.loads((folder / f"raw/gqa/questions/{split}_balanced_questions.json").read_text())
    graphs = json.loads((folder / f"raw/gqa/sceneGraphs/{split}_sceneGraphs.json").read_text())
    file = folder / f"raw/gqa/eval/{split}_choices.json"
    choices = json.loads(file.read_text()) if file.exists() else {}
    for image in coco["images"]:
        key = str(image["id"])
        yield {
            "key": key,
            "images": [(folder / "raw/coco" / split / image["file_name"]).read_bytes()],
            "captions": [note["caption"] for note in coco["annotations"] if note["image_id"] == image["id"]],
            "questions": [
                {"id": i, **q, **({"choices": choices[i]} if i in choices else {})}
                for i, q in questions.items()
                if q["imageId"] == key
            ],
            "scene_graph": graphs[key],
        }


@pytest.mark.parametrize("split", SIZES)
def test_records_are_those_of_the_official_files(prepared, split):
    captions = sources.open_source("scenes", prepared, split)
    questions = sources.open_source("scenes_questions", prepared, split)
    joined = sources.join(captions, questions)
    expected = list(official(prepared, split))
    assert len(captions) == len(questions) == len(joined) == len(expected) == SIZES[split]
    for index, record in enumerate(expected):
        graph = record.pop("scene_graph")
        assert captions[index] == {**record, "questions": [], "dataset": "coco_captions"}
        assert questions[index] == {**record, "captions": [], "scene_graph": graph, "dataset": "gqa"}
        assert joined[index] == {**record, "scene_graph": graph, "dataset": "coco_captions"}


def test_the_same_files_under_their_own_names(prepared):
    assert list(sources.open_source("coco_captions", str(prepared), "train")) == list(
        sources.open_source("scenes", prepared, "train")
    )
    assert list(sources.open_source("gqa", prepared, "train")) == list(
        sources.open_source("scenes_questions", prepared, "train")
    )


def test_sequence_habits(prepared):
    source = sources.open_source("scenes", prepared, "validation")
    assert source[-1] == source[np.int64(len(source) - 1)]
    for index in (len(source), -len(source) - 1):
        with pytest.raises(IndexError):
            source[index]
    assert source[1:5:2] == [source[1], source[3]] and source[-1:] == [source[-1]]
    assert list(pickle.loads(pickle.dumps(source))) == list(source)
    assert repr(source) == repr(sources.open_source("scenes", prepared, "validation"))


def test_many_threads_read_the_same(prepared):
    once = list(sources.open_source("scenes_questions", prepared, "train"))
    source = sources.open_source("scenes_questions", prepared, "train")
    order = np.random.default_rng(0).integers(0, len(once), 600).tolist()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(source.__getitem__, order)) == [once[index] for index in order]


def test_join_keeps_what_both_have(prepared):
    captions = sources.open_source("scenes", prepared, "validation")
    # GQA's imageId is text and need not be padded as COCO's file names are.
    questions = [
        {"key": f"{int(captions[i]['key']):012}", "images": [], "captions": [], "questions": [{"id": str(i)}]}
        for i in (7, 2)
    ]
    joined = sources.join(captions, [*questions, {"key": "n161313", "questions": []}])
    assert [(record["key"], record["questions"]) for record in joined] == [
        (captions[2]["key"], [{"id": "2"}]),
        (captions[7]["key"], [{"id": "7"}]),
    ]
    assert joined[0]["captions"] == captions[2]["captions"]
    with pytest.raises(UserError, match="no image in common"):
        sources.join(captions, sources.open_source("scenes_questions", prepared, "train"))


def test_what_is_missing_is_named(prepared, tmp_path):
    with pytest.raises(UserError, match="data.name='coco'.*coco_captions.*scenes_questions"):
        sources.open_source("coco", prepared, "train")
    with pytest.raises(UserError, match="no split 'dev'.*validation"):
        sources.open_source("scenes", prepared, "dev")
    with pytest.raises(UserError, match=rf"{tmp_path}.*latent_jax.prepare --dataset=gqa --raw=RAW --output={tmp_path}"):
        sources.open_source("gqa", tmp_path, "train")
    with pytest.raises(UserError, match="--dataset=scenes --output="):
        sources.open_source("scenes", tmp_path, "train")
    with pytest.raises(UserError, match="data.path is empty.*--dataset=coco_captions"):
        sources.open_source("coco_captions", "", "train")


def test_a_name_that_is_not_what_lies_there(prepared, tmp_path):
    """One's own folder has the form of the procedural world's, and is not it."""
    own = tmp_path / "own"
    own.mkdir()
    shutil.copytree(prepared / "coco_captions", own / "coco_captions")
    with pytest.raises(UserError, match=r"data.name=scenes: .*own holds coco_captions and not scenes; name what is"):
        sources.open_source("scenes", own, "train")
    with pytest.raises(UserError, match=r"data.name=gqa: .*own holds coco_captions and not gqa"):
        sources.open_source("gqa", own, "train")
    assert len(sources.open_source("coco_captions", own, "train"))
    with pytest.raises(UserError, match=rf"own/coco_captions: lies inside a prepared dataset; set data.path={own}$"):
        sources.open_source("coco_captions", own / "coco_captions", "train")

    shutil.copytree(prepared / "gqa", own / "gqa")  # as the world is where its raw files were removed
    assert list(sources.open_source("scenes", own, "train")) == list(sources.open_source("scenes", prepared, "train"))


def test_scenes_are_made_once_on_first_use(tmp_path, monkeypatch):
    monkeypatch.setenv("LATENT_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(scenes, "SIZES", {"train": 4, "validation": 2})
    first = sources.open_source("scenes", "", "train")
    assert len(first) == 4
    (folder,) = (tmp_path / "cache").iterdir()
    assert scenes.VERSION in folder.name and "seed0" in folder.name and "4-2" in folder.name
    stamp = folder.stat().st_mtime_ns
    assert len(sources.open_source("scenes_questions", "", "validation")) == 2
    assert folder.stat().st_mtime_ns == stamp and list((tmp_path / "cache").iterdir()) == [folder]


def test_losing_the_race_for_the_cache_is_fine(tmp_path, monkeypatch, prepared):
    """Another process finishes first, while this one is still writing."""
    monkeypatch.setenv("LATENT_JAX_CACHE", str(tmp_path))
    monkeypatch.setattr(scenes, "SIZES", {"train": 4})
    write = scenes.write

    def overtaken(directory, **options):
        write(directory, **options)
        (name,) = {path.name.split(".scenes", 1)[1].removesuffix(".prepare") for path in tmp_path.iterdir()}
        shutil.copytree(prepared, tmp_path / f"scenes{name}")

    monkeypatch.setattr(scenes, "write", overtaken)
    assert len(sources.open_source("scenes", "", "train")) == SIZES["train"]
    assert len(list(tmp_path.iterdir())) == 1


def test_building_and_reading_import_neither_tensorflow_nor_jax(prepared, tmp_path):
    program = f"""
import sys
from latent_jax.data import sources
from latent_jax.data.builders.build import build
heavy = {{"tensorflow", "jax", "torch", "grain", "transformers"}}
assert "tensorflow_datasets" not in sys.modules
build("coco_captions", {str(prepared / "raw" / "coco")!r}, {str(tmp_path)!r})
assert len(sources.open_source("coco_captions", {str(tmp_path)!r}, "train")[3]["captions"]) == 4
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def test_plain_tfds_reads_them(prepared):
    """Nothing of ours is needed: features, splits and records are as TFDS itself would have written them."""
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(next((prepared / "gqa").glob("*.*.*")))
    assert {name: split.num_examples for name, split in builder.info.splits.items()} == SIZES
    for theirs, ours in zip(
        builder.as_data_source(split="validation"), sources.open_source("gqa", prepared, "validation"), strict=True
    ):
        (image,) = theirs["images"]
        np.testing.assert_array_equal(image, np.asarray(Image.open(io.BytesIO(ours["images"][0]))))
        assert theirs["key"].decode() == ours["key"]
        assert [json.loads(question) for question in theirs["questions"]] == ours["questions"]
        assert len(theirs["captions"]) == len(theirs["helper_images"]) == 0


def test_records_of_an_older_form_are_named(prepared, tmp_path):
    shutil.copytree(prepared / "gqa", tmp_path / "gqa")
    (file,) = tmp_path.rglob("features.json")
    file.write_text(file.read_text().replace('"helper_images"', '"helpers"'))
    with pytest.raises(UserError, match="prepared by another version of this package; remove it and prepare again"):
        sources.open_source("gqa", tmp_path, "train")


def test_prepared_bytes_depend_on_the_input_alone(prepared, tmp_path):
    build("gqa", prepared / "raw" / "gqa", tmp_path)
    files = sorted((prepared / "gqa").rglob("*.array_record*"))
    assert len(files) == len(SIZES)
    for file in files:
        assert (tmp_path / file.relative_to(prepared)).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("harm", ["flipped", "truncated", "deleted", "info"])
def test_damage_is_named_when_it_is_met(prepared, tmp_path, harm):
    shutil.copytree(prepared / "gqa", tmp_path / "gqa")
    (file,) = tmp_path.rglob("*train.array_record*")
    data = bytearray(file.read_bytes())
    same = sources.fingerprint("gqa", prepared, "train")
    assert same == sources.fingerprint("gqa", tmp_path, "train") != sources.fingerprint("gqa", prepared, "validation")
    if harm == "flipped":
        data[300] ^= 16
        file.write_bytes(data)
    elif harm == "truncated":
        file.write_bytes(data[: len(data) // 2])
    elif harm == "deleted":
        file.unlink()
    else:
        file = file.parent / "dataset_info.json"
        file.write_text(file.read_text()[:200])
    with pytest.raises(UserError, match=rf"{file}: "):
        list(sources.open_source("gqa", tmp_path, "train"))


def test_shards_that_changed_places_are_told_when_they_are_opened(prepared, tmp_path):
    """Their sizes are the same: ArrayRecord fills its blocks."""
    folder = tmp_path / "prepared"
    shutil.copytree(prepared, folder)
    train, validation = (next(folder.glob(f"coco_captions/*/*-{split}.*")) for split in ("train", "validation"))
    if train.stat().st_size != validation.stat().st_size:
        least = min(train, validation, key=lambda file: file.stat().st_size)
        os.truncate(least, max(train.stat().st_size, validation.stat().st_size))
        known = least.with_name("checksums.json")
        known.write_text(json.dumps({f.name: checks.checksum(f) for f in (train, validation)}))
    train.rename(tmp_path / "kept"), validation.rename(train), (tmp_path / "kept").rename(validation)
    with pytest.raises(UserError, match=r"train.*: is the shard .*validation.* under another name \(checksum\)"):
        sources.open_source("coco_captions", folder, "train")


def test_a_large_shard_that_was_written_anew_is_other_data(tmp_path):
    content = bytearray(b"a" * 5 * 2**20)
    (tmp_path / "shard").write_bytes(content)
    written = checks.checksum(tmp_path / "shard")
    (tmp_path / "checksums.json").write_text(json.dumps({"shard": written}))
    found = checks.sums(tmp_path, ["shard"])
    assert found == {"shard": {"size": len(content), "crc32": written["crc32"]}}  # as runs begun before have it
    content[-1] = 0
    (tmp_path / "shard").write_bytes(content)
    assert checks.sums(tmp_path, ["shard"]) != found
    (tmp_path / "checksums.json").write_text(json.dumps({"shard": found["shard"]}))  # by an earlier version
    assert checks.sums(tmp_path, ["shard"]) == found


def test_a_smaller_share_is_part_of_a_larger_one():
    def numbers(share, seed=1):
        return [record["key"] for record in sources.share([{"key": n} for n in range(200)], share, seed)]

    shares = [numbers(share) for share in (0.001, 0.05, 0.25, 1)]
    assert [len(share) for share in shares] == [1, 10, 50, 200]
    for smaller, larger in zip(shares, shares[1:], strict=False):
        assert larger[: len(smaller)] == smaller
    assert sorted(shares[-1]) == list(range(200)) != shares[-1]
    assert numbers(0.25) == shares[2] != numbers(0.25, seed=2)
