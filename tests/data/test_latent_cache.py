"""The latent cache's files: what comes back, what is refused, and what is left of a making that was killed."""

import os
import zlib
from collections.abc import Sequence

import ml_dtypes
import numpy as np
import pytest

from latent_jax.data import latent_cache
from latent_jax.data.latent_cache import Cached, LatentCache
from latent_jax.errors import UserError

MADE_FROM = {"dataset": "scenes", "encoder": "a5", "latent": {"grid": 2, "space": "merged"}}
RECORDS, SHAPE = 11, (4, 6)


@pytest.fixture(autouse=True)
def four_records_a_shard(monkeypatch):
    monkeypatch.setattr(latent_cache, "_SHARD_RECORDS", 4)


def opened(folder, dtype="float32", **changes):
    return LatentCache.open(folder, {**MADE_FROM, **changes}, RECORDS, SHAPE, dtype)


def image(index):
    return b"image %d" % index


def latents(index):
    return np.random.default_rng(index).normal(size=SHAPE).astype(np.float32)


def fill(cache, without=()):
    for shard in cache.missing():
        cache.write(shard, {i: ([image(i)], latents(i)) for i in cache.indices(shard) if i not in without})


class Records(Sequence):
    """A source of records of one image each, the last of which has none."""

    def __len__(self):
        return RECORDS

    def __getitem__(self, index):
        return {"key": f"r{index}", "images": [image(index)] if index < RECORDS - 1 else []}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_was_written_is_read_record_by_record(tmp_path, dtype):
    fill(opened(tmp_path / "c", dtype))
    cache = opened(tmp_path / "c", dtype)
    assert cache.missing() == [] and [len(cache.indices(shard)) for shard in range(cache.shards)] == [4, 4, 3]
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32
    for index in reversed(range(RECORDS)):
        found = cache.read(index, [image(index)])
        assert found.dtype == kind
        np.testing.assert_array_equal(found, latents(index).astype(kind))


def test_records_bring_their_latents_where_the_cache_has_them(tmp_path):
    cache = opened(tmp_path)
    fill(cache, without=(1, 4))
    source = Cached(Records(), cache, lambda record: record["images"][:1])
    assert [("latents" in record) for record in source] == [i not in (1, 4, RECORDS - 1) for i in range(RECORDS)]
    np.testing.assert_array_equal(source[-2]["latents"], latents(RECORDS - 2))
    with pytest.raises(IndexError):
        source[RECORDS]


def test_a_record_has_the_latents_of_all_its_images(tmp_path):
    """Two images of two latents each, or one of them."""
    cache = opened(tmp_path)
    pair = [image(0), image(1)]
    cache.write(0, {0: (pair, latents(0)), 1: ([image(1)], latents(1)[:2])})
    for shard in cache.missing():
        cache.write(shard, {})
    np.testing.assert_array_equal(cache.read(0, pair), latents(0))
    np.testing.assert_array_equal(cache.read(1, [image(1)]), latents(1)[:2])
    for other in ([image(1), image(0)], [image(0)], [image(0) + image(1)], [*pair, image(1)]):
        with pytest.raises(UserError, match="record 0 has another image"):
            cache.read(0, other)


@pytest.mark.parametrize("summed", [True, False])
def test_a_cache_of_one_image_a_record_is_read_as_it_was_written(tmp_path, summed):
    """Rows as they have always been: 1, the image's CRC-32, and lately a checksum of the row."""
    cache = opened(tmp_path)
    sums = [("sum", "<u4")] if summed else []
    kind = np.dtype([("known", "<u4"), ("image", "<u4"), *sums, ("latents", "<f4", SHAPE)])
    for shard in cache.missing():
        table = np.zeros(len(cache.indices(shard)), kind)
        for row, index in zip(table, cache.indices(shard)):
            row["known"], row["image"], row["latents"] = 1, zlib.crc32(image(index)), latents(index)
            if summed:
                head = zlib.crc32(np.array([index, 1, row["image"]], "<u8").tobytes())
                row["sum"] = zlib.crc32(latents(index).tobytes(), head)
        np.save(tmp_path / f"latents-{shard:05}.npy", table)
    for index in range(RECORDS):
        np.testing.assert_array_equal(opened(tmp_path).read(index, [image(index)]), latents(index))


def test_a_making_that_was_killed_goes_on_with_the_shards_that_are_missing(tmp_path, monkeypatch):
    cache = opened(tmp_path)
    cache.write(1, {i: ([image(i)], latents(i)) for i in cache.indices(1)})
    # A kill while a shard is written leaves no file by its name.
    monkeypatch.setattr(os, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cache.write(0, {0: ([image(0)], latents(0))})
    monkeypatch.undo()
    monkeypatch.setattr(latent_cache, "_SHARD_RECORDS", 4)
    again = opened(tmp_path)
    assert again.missing() == [0, 2]
    with pytest.raises(UserError, match=r"latents-00000.npy: missing"):
        again.read(5, [image(5)])
    kept = (tmp_path / "latents-00001.npy").stat().st_mtime_ns
    fill(again)
    assert (tmp_path / "latents-00001.npy").stat().st_mtime_ns == kept
    assert opened(tmp_path).missing() == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"encoder": "b6"}, r"encoder \(a5 there, b6 here\)"),
        ({"latent": {"grid": 3, "space": "merged"}}, r"latent.grid \(2 there, 3 here\)"),
        ({"preprocessing": {"max_pixels": 9}}, r"preprocessing.max_pixels \(None there, 9 here\)"),
        ({"dtype": "bfloat16"}, r"dtype \(float32 there, bfloat16 here\)"),
    ],
)
def test_a_cache_of_something_else_is_refused_in_one_line(tmp_path, change, words):
    opened(tmp_path)
    with pytest.raises(UserError, match=rf"{tmp_path}: this latent cache was made from something else: {words}; set"):
        opened(tmp_path, **change)


def test_other_records_and_other_images_are_refused(tmp_path):
    cache = opened(tmp_path)
    fill(cache)
    with pytest.raises(UserError, match=r"records \(11 there, 12 here\)"):
        LatentCache.open(tmp_path, MADE_FROM, RECORDS + 1, SHAPE, "float32")
    with pytest.raises(UserError, match="record 3 has another image"):
        cache.read(3, [image(4)])


def test_directories_and_files_that_are_no_cache_are_named(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty and no latent cache"):
        opened(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
    cache = opened(tmp_path / "c")
    fill(cache)
    shard = tmp_path / "c" / "latents-00002.npy"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"latents-00002.npy: damaged; delete it"):
        opened(tmp_path / "c").missing()
    (tmp_path / "c" / "cache.json").write_text("[")
    with pytest.raises(UserError, match="cache.json: not a JSON object"):
        opened(tmp_path / "c")


def test_an_archive_under_the_name_of_a_shard_is_damage(tmp_path):
    """NumPy opens an archive whatever its name is, as something that is no array."""
    cache = opened(tmp_path)
    fill(cache)
    shard = tmp_path / "latents-00001.npy"
    with shard.open("wb") as file:
        np.savez(file, rows=np.zeros(3))
    with pytest.raises(UserError, match=r"latents-00001.npy: damaged; delete it"):
        opened(tmp_path).missing()


def test_latents_that_are_not_as_they_were_written_are_refused(tmp_path):
    """Zeros too: they would read as a record that was left out."""
    fill(opened(tmp_path), without=(1,))
    shard = tmp_path / "latents-00000.npy"
    data = bytearray(shard.read_bytes())
    data[-100:] = bytes(100)
    shard.write_bytes(data)
    cache = opened(tmp_path)
    assert cache.read(1, [image(1)]) is None
    with pytest.raises(UserError, match=r"latents-00000.npy: damaged; delete it, and it is made again"):
        cache.read(3, [image(3)])


def test_a_shard_of_large_latents_is_cut_by_its_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(latent_cache, "_SHARD_BYTES", 250)
    assert opened(tmp_path).shard_records == 2  # 4 * 6 * 4 bytes and 8 more a record
