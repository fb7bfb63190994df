"""Files that are not what their names say: each costs what it holds, or is one line; nothing is waited for."""

import json
import os
import tarfile
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data.builders.official import coco_folder, picture, records, run, samples, skipped, write_captions, write_tar

from latent_jax.data import images
from latent_jax.data.builders import coco_captions


def exif(entry: bytes) -> bytes:
    """A JPEG with an EXIF block of this one entry: tag, type, count, value."""
    block = b"Exif\0\0MM\0*\0\0\0\x08\0\x01" + entry + bytes(4)
    return b"\xff\xd8\xff\xe1" + (len(block) + 2).to_bytes(2, "big") + block + picture(1)[2:]


ORIENTATIONS = {
    "99": b"\x01\x12\0\x03\0\0\0\x01\0\x63\0\0",
    "0": b"\x01\x12\0\x03\0\0\0\x01\0\0\0\0",
    "text": b"\x01\x12\0\x02\0\0\0\x03up\0\0",
    "several": b"\x01\x12\0\x03\0\0\0\x02\0\x09\0\x09",
    "outside": b"\x01\x12\0\x03\x7f\xff\xff\xff\x7f\xff\xff\xff",
    "no type": b"\x01\x12\xff\xff\0\0\0\x01\0\x06\0\0",
    "cut": b"\x01\x12",
}


@pytest.mark.parametrize("kind", ORIENTATIONS)
def test_exif_nonsense_is_an_upright_image(tmp_path, capsys, kind):
    data = exif(ORIENTATIONS[kind])
    coco_folder(tmp_path / "raw", 3)
    (tmp_path / "raw" / "train2017" / "000000000010.jpg").write_bytes(data)
    status, err = run(capsys, "coco_captions", tmp_path / "raw", tmp_path / "out")
    assert status == 0, err
    assert records("coco_captions", tmp_path / "out", "train")["10"]["images"] == [data]
    assert images.open_image(data).size == (40, 24)


def _device(file):
    try:
        os.mknod(file, 0o020666, os.makedev(1, 5))  # /dev/zero, which has no end
    except PermissionError:
        file.symlink_to("/dev/zero")


NOT_FILES = {
    "fifo": os.mkfifo,
    "device": _device,
    "folder": os.mkdir,
    "loop": lambda file: file.symlink_to(file),
    "nowhere": lambda file: file.symlink_to(file.with_name("gone")),
}


@pytest.mark.parametrize("kind", NOT_FILES)
def test_what_is_no_file_in_an_images_place_is_skipped(tmp_path, capsys, kind):
    coco_folder(tmp_path / "raw", 3)
    file = tmp_path / "raw" / "train2017" / "000000000010.jpg"
    file.unlink()
    NOT_FILES[kind](file)
    assert run(capsys, "coco_captions", tmp_path / "raw", tmp_path / "out", "--max_bad=0.5")[0] == 0
    assert list(records("coco_captions", tmp_path / "out", "train")) == ["9", "11"]
    (line,) = skipped(tmp_path / "out")
    assert str(file) in line["reason"]


@pytest.mark.parametrize("kind", NOT_FILES)
@pytest.mark.parametrize(
    "dataset, name",
    [
        ("coco_captions", "annotations/captions_train2017.json"),
        ("conceptual_captions", "Train_GCC-training.tsv"),
        ("gqa", "questions/val_balanced_questions.json"),
        ("scienceqa", "pid_splits.json"),
        ("blink", "Jigsaw/val-00000-of-00001.parquet"),
        ("mmvp", "Questions.csv"),
        ("vsp", "train.jsonl"),
        ("vstar", "test_questions.jsonl"),
    ],
)
def test_what_is_no_file_in_a_lists_place_is_one_line(tmp_path, capsys, kind, dataset, name):
    file = tmp_path / "raw" / name
    file.parent.mkdir(parents=True)
    (tmp_path / "raw" / "training").mkdir()
    NOT_FILES[kind](file)
    status, err = run(capsys, dataset, tmp_path / "raw", tmp_path / "out")
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1 and str(tmp_path / "raw") in err
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


@pytest.mark.parametrize("kind", NOT_FILES)
def test_what_is_no_file_in_a_shards_place_is_counted(tmp_path, capsys, kind):
    write_tar(tmp_path / "raw" / "00000.tar", samples(0, 3))
    NOT_FILES[kind](tmp_path / "raw" / "00001.tar")
    status, err = run(capsys, "laion", tmp_path / "raw", tmp_path / "out", "--max_bad=0.5")
    assert status == 0 and "00001.tar: not a regular file" in err
    assert len(records("laion", tmp_path / "out", "train")) == 3


def test_an_image_that_vanishes_after_it_was_listed(tmp_path, capsys, monkeypatch):
    coco_folder(tmp_path / "raw", 3)
    read = coco_captions.read_image

    def vanishes(file):
        if file.name == "000000000010.jpg":
            file.unlink()
        return read(file)

    monkeypatch.setattr(coco_captions, "read_image", vanishes)
    assert run(capsys, "coco_captions", tmp_path / "raw", tmp_path / "out", "--max_bad=0.5")[0] == 0
    assert list(records("coco_captions", tmp_path / "out", "train")) == ["9", "11"]


def header(name: str, size: bytes, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A tar header that says `size` (12 bytes) and has the right checksum."""
    info = tarfile.TarInfo(name)
    info.type = kind
    block = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    block[124:136] = size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize(
    "size",
    [b"\xff" * 12, b"\x80" + b"\xff" * 11, b"77777777777\0", b"-0000000001\0", b"nonsense...\0"],
    ids=["negative", "2^88", "8 GiB", "minus", "text"],
)
def test_a_member_of_an_absurd_size_costs_itself(tmp_path, capsys, size):
    write_tar(tmp_path / "raw" / "00000.tar", samples(0, 4))
    whole = (tmp_path / "raw" / "00000.tar").read_bytes()
    (tmp_path / "raw" / "00000.tar").write_bytes(header("evil.jpg", size) + whole)
    tracemalloc.start()
    try:
        status, err = run(capsys, "laion", tmp_path / "raw", tmp_path / "out", "--max_bad=0.5")
        assert tracemalloc.get_traced_memory()[1] < 2**26
    finally:
        tracemalloc.stop()
    assert status == 0 and "00000.tar" in err
    assert len(records("laion", tmp_path / "out", "train")) == 4


def test_a_member_that_leads_out_writes_nothing_there(tmp_path, capsys):
    content = samples(0, 1) | {"../../../escaped": samples(1, 1)["000000001"], "/tmp/x": samples(2, 1)["000000002"]}
    write_tar(tmp_path / "deep" / "raw" / "00000.tar", content)
    before = {path for path in tmp_path.rglob("*") if "out" not in path.parts}
    assert run(capsys, "laion", tmp_path / "deep" / "raw", tmp_path / "out")[0] == 0
    assert before == {path for path in tmp_path.rglob("*") if "out" not in path.parts}
    assert len(records("laion", tmp_path / "out", "train")) == 3


@pytest.mark.parametrize(
    "harm",
    [
        lambda data: data[:-9],
        lambda data: data[: len(data) // 2] + bytes(64) + data[len(data) // 2 + 64 :],
        lambda data: data[:8] + b"\xff" * 40 + data[48:],
        lambda data: b"PAR1" + bytes(100) + b"PAR1",
        lambda data: b"",
    ],
    ids=["cut", "zeros", "page", "footer", "empty"],
)
def test_a_damaged_list_beside_a_shard_costs_no_record(tmp_path, capsys, harm):
    write_tar(tmp_path / "raw" / "00000.tar", samples(0, 3))
    rows = [{"key": key, "status": "success", "error_message": None} for key in samples(0, 3)]
    file = tmp_path / "raw" / "00000.parquet"
    pq.write_table(pa.Table.from_pylist(rows), file)
    file.write_bytes(harm(file.read_bytes()))
    assert run(capsys, "laion", tmp_path / "raw", tmp_path / "out", "--max_bad=0.9")[0] == 0
    assert len(records("laion", tmp_path / "out", "train")) == 3


def test_a_list_that_is_no_utf8_inside(tmp_path, capsys):
    """Parquet does not check its texts; they are when they become Python's."""
    write_tar(tmp_path / "raw" / "00000.tar", samples(0, 3))
    keys = pa.array([b"\xff\xfe", b"\xff", b"\xfe"]).cast(pa.binary())
    bad = pa.Array.from_buffers(pa.string(), 3, keys.buffers())
    pq.write_table(pa.table({"key": bad, "status": ["success"] * 3}), tmp_path / "raw" / "00000.parquet")
    status, err = run(capsys, "laion", tmp_path / "raw", tmp_path / "out")
    assert status == 0 and "cannot be read" in err
    assert len(records("laion", tmp_path / "out", "train")) == 3


def test_byte_order_marks_and_windows_lines(tmp_path, capsys):
    content = coco_folder(tmp_path / "raw", 2)
    file = tmp_path / "raw" / "annotations" / "captions_train2017.json"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(content, indent=1).replace("\n", "\r\n").encode())
    assert run(capsys, "coco_captions", tmp_path / "raw", tmp_path / "out")[0] == 0
    assert records("coco_captions", tmp_path / "out", "train")["9"]["captions"] == [
        "Caption 0 of 9.",
        "Caption 1 of 9.",
    ]

    raw = tmp_path / "mmvp"
    (raw / "MMVP Images").mkdir(parents=True)
    rows = ["Index,Question,Options,Correct Answer"]
    for index in (1, 2, "9" * 5000):
        rows.append(f"{index},A\0 question?,(a) yes (b) no,(a)")
    for index in (1, 2):
        (raw / "MMVP Images" / f"{index}.jpg").write_bytes(picture(index))
    (raw / "Questions.csv").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(rows).encode())
    status, err = run(capsys, "mmvp", raw, tmp_path / "out", "--max_bad=0.5")
    assert status == 0 and "row 3" in err
    assert list(records("mmvp", tmp_path / "out", "test")) == ["1", "2"]


def test_a_list_in_gzip_or_of_bare_brackets_is_one_line(tmp_path, capsys):
    import gzip

    coco_folder(tmp_path / "raw", 2)
    file = tmp_path / "raw" / "annotations" / "captions_train2017.json"
    for data in (gzip.compress(bytes(2**24)), b"[" * 2**20, b'{"images": ' + b"[" * 2**20, b"\0" * 100, b"1" * 10000):
        file.write_bytes(data)
        status, err = run(capsys, "coco_captions", tmp_path / "raw", tmp_path / "out")
        assert status == 2 and err.count("\n") == 1 and str(file) in err


def test_annotations_of_one_key_twice(tmp_path, capsys):
    content = coco_folder(tmp_path / "raw", 3)
    content["images"].append(content["images"][0])
    content["annotations"].append(content["annotations"][0])
    write_captions(tmp_path / "raw", content)
    status, err = run(capsys, "coco_captions", tmp_path / "raw", tmp_path / "out", "--max_bad=0.5")
    assert status == 0 and "image id 9 comes twice" in err and "annotation id 100 comes twice" in err
    assert list(records("coco_captions", tmp_path / "out", "train")) == ["9", "10", "11"]
