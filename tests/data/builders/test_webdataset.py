"""Web-scale captions as people have them: img2dataset's shards, whole and broken, and Conceptual Captions' TSV."""

import io
import tarfile
import zlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data.builders.official import picture, records, run, samples, skipped, write_tar


def shard(raw, number=0, count=12):
    content = samples(10000 * number, count)
    write_tar(raw / f"{number:05}.tar", content)
    return content


def listing(raw, keys, failed=(), number=0):
    """The parquet beside a shard."""
    rows = [{"key": key, "status": "success", "error_message": None} for key in keys]
    rows += [{"key": key, "status": "failed_to_download", "error_message": "HTTP Error 404"} for key in failed]
    pq.write_table(pa.Table.from_pylist(rows), raw / f"{number:05}.parquet")


def expected(content):
    """Records, with urls as `samples` writes them."""
    return {
        key: {
            "key": key,
            "images": [fields["jpg"]],
            "captions": [fields["txt"].decode()],
            "questions": [],
            "meta": {"url": f"http://x/{10000 * int(key[:5]) + int(key[5:])}", "width": 40, "similarity": 0.25},
        }
        for key, fields in content.items()
    }


def test_laion_as_downloaded(tmp_path, capsys):
    content = shard(tmp_path / "raw") | shard(tmp_path / "raw", 1, 5)
    listing(tmp_path / "raw", list(content)[:12], ["000000100", "000000101"])
    write_tar(tmp_path / "raw" / "val" / "00000.tar", samples(7, 2))
    status, err = run(capsys, "laion", tmp_path / "raw", tmp_path / "out")
    assert status == 0
    # Links that were dead when the set was downloaded cost nothing, but are told.
    assert "train: skipped 2 of 14 downloads\n" in err and "images" not in err.split("train: skipped")[1]
    assert [line["reason"].split(": ", 1)[1] for line in skipped(tmp_path / "out")] == [
        "000000100: failed_to_download (HTTP Error 404)",
        "000000101: failed_to_download (HTTP Error 404)",
    ]
    found = records("laion", tmp_path / "out", "train")
    assert found == expected(content) and list(found) == list(content)
    assert list(records("laion", tmp_path / "out", "validation")) == list(samples(7, 2))


def test_long_names(tmp_path, capsys):
    """Beyond 100 characters a name stands in a header of its own, in two dialects."""
    for number, form in enumerate((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)):
        key = "k" * 120 + str(number)
        with tarfile.open(tmp_path / f"{number}.tar", "w", format=form) as archive:
            for suffix, data in samples(number, 1)[f"{number:09}"].items():
                info = tarfile.TarInfo(f"folder/{key}.{suffix}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    status, err = run(capsys, "laion", tmp_path, tmp_path / "out")
    assert status == 0 and ": skipped" not in err
    assert [len(key) for key in records("laion", tmp_path / "out", "train")] == [len("folder/") + 121] * 2


def corrupt_header(raw, content):
    """The header of 000000005.jpg: Python's own reader ends here without a word."""
    file = raw / "00000.tar"
    with tarfile.open(file) as archive:
        offset = archive.getmember("000000005.jpg").offset_data - tarfile.BLOCKSIZE
    data = bytearray(file.read_bytes())
    data[offset : offset + 100] = b"\xff" * 100
    file.write_bytes(data)


def cut_off(raw, content):
    file = raw / "00000.tar"
    with tarfile.open(file) as archive:
        member = archive.getmember("000000010.jpg")
    file.write_bytes(file.read_bytes()[: member.offset_data + 100])


def cut_between(raw, content):
    """The end of a member is the end of the file: only the end mark of the archive is missing, and what it followed."""
    file = raw / "00000.tar"
    with tarfile.open(file) as archive:
        end = archive.getmember("000000011.jpg").offset
    file.write_bytes(file.read_bytes()[:end])


def change(**fields):
    def breaks(raw, content):
        its = content["000000005"] | fields
        content["000000005"] = {suffix: data for suffix, data in its.items() if data is not None}
        write_tar(raw / "00000.tar", content)

    return breaks


BROKEN = {
    "corrupt header": (corrupt_header, ["000000005"], " cannot be read"),
    "cut off": (cut_off, ["000000010", "000000011"], "cut off in 000000010.jpg"),
    "cut between": (cut_between, ["000000011"], "00000.tar: cut off after "),
    "corrupt image": (change(jpg=picture(5)[:300]), ["000000005"], "000000005: 000000005.jpg: not an image"),
    "no image": (change(jpg=None), ["000000005"], "000000005: no image"),
    "no caption": (change(txt=b" \n"), ["000000005"], "000000005: no caption"),
    "corrupt json": (change(json=b"{"), ["000000005"], "000000005: json cannot be read"),
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("listed", [False, True])
def test_a_broken_shard_loses_what_is_broken_and_says_so(tmp_path, capsys, kind, listed):
    raw = tmp_path / "raw"
    content = shard(raw)
    whole = dict(content)
    shard(raw, 1, 28)
    breaks, lost, reason = BROKEN[kind]
    breaks(raw, content)
    if listed:
        listing(raw, whole)
    status, err = run(capsys, "laion", raw, tmp_path / "out", "--max_bad=0.2")
    assert status == 0 and reason in err
    found = records("laion", tmp_path / "out", "train")
    assert sorted(whole.keys() - found.keys()) == lost and len(found) == 40 - len(lost)
    lines = [line for line in skipped(tmp_path / "out") if line["kind"] == "image"]
    if listed:  # the parquet beside the shard knows each one that is missing
        for key in lost:
            assert any(key in line["reason"] for line in lines)
    status, err = run(capsys, "laion", raw, tmp_path / "strict", "--max_bad=0")
    assert status == 2 and "images cannot be used, more than --max_bad=0 allows" in err


def test_not_a_tar_and_no_list(tmp_path, capsys):
    raw = tmp_path / "raw"
    content = shard(raw)
    (raw / "00001.tar").write_bytes(b"<html>not found</html>" * 100)
    listing(raw, content)
    (raw / "00000.parquet").write_bytes((raw / "00000.parquet").read_bytes()[:-20])
    status, err = run(capsys, "laion", raw, tmp_path / "out", "--max_bad=0.1")
    assert status == 0 and "00001.tar: " in err and "train: skipped 1 of 13 images" in err
    assert "train: skipped 1 of 1 lists\n" in err and "failed downloads are not counted" in err
    assert list(records("laion", tmp_path / "out", "train")) == list(content)


def test_the_same_key_twice(tmp_path, capsys):
    """In one shard, and in two of them: the first is kept, whichever thread was faster."""
    raw = tmp_path / "raw"
    write_tar(raw / "00000.tar", samples(0, 8))
    write_tar(raw / "00001.tar", samples(6, 4))
    write_tar(raw / "00002.tar", samples(9, 3))
    with tarfile.open(raw / "00002.tar", "a") as archive, tarfile.open(raw / "00000.tar") as first:
        for member in first.getmembers()[:3]:
            archive.addfile(member, first.extractfile(member))
        for member in first.getmembers()[:3]:  # the same name again, later
            archive.addfile(member, first.extractfile(member))
    status, err = run(capsys, "laion", raw, tmp_path / "out", "--max_bad=0.5", "--workers=3")
    assert status == 0
    found = records("laion", tmp_path / "out", "train")
    assert list(found) == list(samples(0, 12))
    assert found == expected(samples(0, 12))
    reasons = [line["reason"] for line in skipped(tmp_path / "out")]
    assert reasons == [
        "00001.tar: image 000000006 comes twice",
        "00001.tar: image 000000007 comes twice",
        "00002.tar: image 000000009 comes twice",
        f"{raw / '00002.tar'}: 000000000: has jpg twice",
    ]


def test_members_of_two_folders_are_not_mixed(tmp_path, capsys):
    """A sample's name is its path up to the first dot of the last name, as webdataset has it."""
    its = samples(0, 2)["000000000"]
    write_tar(
        tmp_path / "raw" / "00000.tar", {"a/1": its, "b/1": its, "c/1": {"jpg": its["jpg"]}, "d/1": {"txt": b"x"}}
    )
    status, err = run(capsys, "laion", tmp_path / "raw", tmp_path / "out", "--max_bad=0.5")
    assert status == 0 and "skipped 2 of 4 images" in err
    assert list(records("laion", tmp_path / "out", "train")) == ["a/1", "b/1"]


def test_shards_of_two_splits_in_one_folder(tmp_path, capsys):
    write_tar(tmp_path / "raw" / "cc3m-train-0000.tar", samples(0, 3))
    write_tar(tmp_path / "raw" / "cc3m-validation-0000.tar", samples(3, 2))
    assert run(capsys, "conceptual_captions", tmp_path / "raw", tmp_path / "out")[0] == 0
    assert len(records("conceptual_captions", tmp_path / "out", "train")) == 3
    assert len(records("conceptual_captions", tmp_path / "out", "validation")) == 2


def test_links_alone_are_no_dataset(tmp_path, capsys):
    (tmp_path / "raw").mkdir()
    pq.write_table(pa.table({"URL": ["http://x"], "TEXT": ["x"]}), tmp_path / "raw" / "part-00000.parquet")
    status, err = run(capsys, "laion", tmp_path / "raw", tmp_path / "out")
    assert status == 2 and "only the links (*.parquet) here, expected webdataset shards: img2dataset" in err


def tsv(raw, rows, name="Train_GCC-training.tsv"):
    raw.mkdir(parents=True, exist_ok=True)
    (raw / name).write_text("".join(f"{caption}\t{url}\n" for caption, url in rows))


def test_conceptual_captions(tmp_path, capsys):
    """Shards are preferred; the TSV is read with the images that lie beside it."""
    rows = [(f"a picture of {i}", f"http://x/{i}.jpg") for i in range(30)]
    raw = tmp_path / "tsv"
    tsv(raw, rows)
    tsv(raw, rows[:2], "Validation_GCC-1.1.0-Validation.tsv")
    for folder, count in (("training", 30), ("validation", 2)):
        (raw / folder).mkdir()
        for i, (_, url) in enumerate(rows[:count]):
            suffix = ".jpg" if i % 2 else ""
            (raw / folder / f"{i}_{zlib.crc32(url.encode())}{suffix}").write_bytes(picture(i))
    (raw / "training" / f"4_{zlib.crc32(rows[4][1].encode())}").unlink()
    (raw / "training" / f"6_{zlib.crc32(rows[6][1].encode())}").write_bytes(b"<html>")
    status, err = run(capsys, "conceptual_captions", raw, tmp_path / "out")
    assert status == 0
    assert "train: skipped 1 of 30 downloads\n" in err
    assert "train: skipped 1 of 29 images\n" in err
    found = records("conceptual_captions", tmp_path / "out", "train")
    assert list(found) == [str(i) for i in range(30) if i not in (4, 6)]
    assert found["7"] == {"key": "7", "images": [picture(7)], "captions": ["a picture of 7"], "questions": []}
    assert len(records("conceptual_captions", tmp_path / "out", "validation")) == 2

    shard(raw)
    run(capsys, "conceptual_captions", raw, tmp_path / "shards")
    assert list(records("conceptual_captions", tmp_path / "shards", "train")) == list(samples(0, 12))


def test_conceptual_captions_without_images(tmp_path, capsys):
    raw = tmp_path / "raw"
    tsv(raw, [("a", "http://x")])
    status, err = run(capsys, "conceptual_captions", raw, tmp_path / "out")
    assert status == 2 and f"the images are expected in {raw / 'training'}/, or as webdataset shards" in err
    (raw / "training").mkdir()
    status, err = run(capsys, "conceptual_captions", raw, tmp_path / "out")
    assert status == 2 and "no row has an image; expected names like LINE_CRC" in err
