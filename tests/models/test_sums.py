"""Checksums of model folders: whatever is damaged is named by whoever reads it, and what is meant can be accepted."""

import json
import random
import shutil

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from transformers import Qwen2_5_VLForConditionalGeneration

from latent_jax.assets import TINY_VL
from latent_jax.errors import UserError
from latent_jax.models import hf_export, hf_io, sums, tensor_files
from latent_jax.models.origin import check_origin, keep_origin
from latent_jax.models.qwen2_5_vl.config import from_json
from latent_jax.runtime import files
from tests.models import tiny_hf

SHARD = 40_000
HEAD = {"slots": np.ones((4, 3), np.float32), "fc1": np.full((3, 5), 3, ml_dtypes.bfloat16), "scale": np.float32(2)}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """An export in shards with a latent head and a card."""
    source, out = tiny_hf.write(tmp_path_factory.mktemp("a") / "hf"), tmp_path_factory.mktemp("b") / "hf"
    config = from_json(source / "config.json")
    options = dict(max_shard_bytes=SHARD, latent=(HEAD, {"grid": 2}), card="# A card")
    assert hf_export.save(out, hf_io.load(source), config, source=source, **options) == []
    return out


@pytest.fixture
def folder(exported, tmp_path):
    shutil.copytree(exported, tmp_path / "hf")
    return tmp_path / "hf"


def read(directory):
    """All that is read of a model folder, as its readers do."""
    origin = hf_io.resolve(directory)
    return hf_io.load(origin), hf_export.load_latent(origin)


def copy(directory, output):
    checkpoint = hf_io.Checkpoint.open(directory)
    config = from_json(directory / "config.json")
    return hf_export.save(output, checkpoint.weights(config), config, source=directory, keep_not_finite=True)


def flip(file, at, bit=0):
    content = bytearray(file.read_bytes())
    content[at] ^= 1 << bit
    file.write_bytes(content)


def refused(reader, *arguments, file) -> str:
    with pytest.raises(UserError) as caught:
        reader(*arguments)
    said = str(caught.value)
    assert said.startswith(f"{file}: ") and "\n" not in said
    return said


CHECKED = [
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model.safetensors.index.json",
    "latent_config.json",
    "latent_head.safetensors",
    "model-00001-of-00003.safetensors",
    "model-00003-of-00003.safetensors",
    "checksums.json",
]


def test_the_list_above_is_the_whole_folder_but_its_card(exported):
    assert len(list(exported.glob("model-*"))) == 3
    assert {file.name for file in exported.iterdir()} == {*CHECKED, "model-00002-of-00003.safetensors", "README.md"}
    known = sums.check(exported)
    assert known.keys() == {file.name for file in exported.glob("*.safetensors")}


@pytest.mark.parametrize("name", CHECKED)
def test_a_flipped_bit_is_noticed_wherever_it_is(folder, tmp_path, name):
    whole, draw = (folder / name).read_bytes(), random.Random(name)
    places = {0, 7, len(whole) // 2, len(whole) - 1, *(draw.randrange(len(whole)) for _ in range(12))}
    for at in sorted(places):
        flip(folder / name, at, draw.randrange(8))
        if name == "checksums.json" and json_equal(folder / name, whole):
            continue  # white space, or the case of an escape
        refused(read, folder, file=folder / name)
        refused(copy, folder, tmp_path / "out", file=folder / name)
        assert not (tmp_path / "out").exists()
        (folder / name).write_bytes(whole)
    read(folder)


def json_equal(file, content) -> bool:
    try:
        return json.loads(file.read_bytes()) == json.loads(content)
    except ValueError:
        return False


@pytest.mark.parametrize("name", CHECKED[:-1])
def test_a_file_that_is_cut_empty_or_gone_is_noticed(folder, tmp_path, name):
    whole = (folder / name).read_bytes()
    for content in (whole[:-1], whole[: len(whole) // 2], b"", whole + b"\n", None):
        (folder / name).write_bytes(content) if content is not None else (folder / name).unlink()
        refused(read, folder, file=folder / name)
        refused(copy, folder, tmp_path / "out", file=folder / name)


def test_both_files_of_the_head_gone_are_no_model_without_a_head(folder):
    for name in ("latent_head.safetensors", "latent_config.json"):
        (folder / name).unlink()
    assert "missing" in refused(read, folder, file=folder / "latent_config.json")


def test_two_tensors_that_change_places_are_noticed(folder):
    """Same bytes, same shapes, same file."""
    file = next(
        file for file in sorted(folder.glob("model-*")) if "q_proj" in file.read_bytes()[:3000].decode("latin1")
    )
    tensors = {name: np.array(tensor) for name, tensor in tensor_files.read(file).items()}
    a, b = (f"model.layers.1.self_attn.{name}_proj.weight" for name in "kv")
    tensors[a], tensors[b] = tensors[b], tensors[a]
    tensor_files.write(file, {name: tensor_files.Entry.of(tensor) for name, tensor in tensors.items()})
    assert "damaged" in refused(hf_io.load, folder, file=file)


def test_the_line_says_how_a_change_is_accepted(folder):
    config = json.loads((folder / "generation_config.json").read_text()) | {"eos_token_id": 3}
    (folder / "generation_config.json").write_text(json.dumps(config))
    said = refused(read, folder, file=folder / "generation_config.json")
    assert f"remove {folder / 'checksums.json'}" in said
    (folder / "checksums.json").unlink()
    read(folder)


def test_a_card_is_the_owners_and_further_files_are_nobodys(folder):
    (folder / "README.md").write_text("mine")
    (folder / "notes.txt").write_text("mine")
    read(folder)
    (folder / "README.md").unlink()
    read(folder)


def test_an_export_of_an_earlier_version_and_a_published_folder_have_none(folder, tmp_path):
    (folder / "checksums.json").unlink()
    flip(folder / "model-00003-of-00003.safetensors", -1)
    read(folder)
    read(tiny_hf.write(tmp_path / "published"))
    copy(folder, tmp_path / "out")
    assert (tmp_path / "out" / "checksums.json").exists()


def test_only_what_is_read_is_compared(folder):
    """A vision tower alone needs no look at the language model's gigabytes."""
    checkpoint = hf_io.Checkpoint.open(folder)
    name = "model.norm.weight"
    file = folder / checkpoint.files[name]
    length = int.from_bytes(file.read_bytes()[:8], "little")
    at = json.loads(file.read_bytes()[8 : 8 + length])[name]["data_offsets"][0]
    flip(file, 8 + length + at)
    hf_io.load(folder, prefix="vision.")
    assert f"tensor '{name}' is damaged" in refused(hf_io.load, folder, file=file)


BARE = json.dumps({"content": [], "checksum": files.checksum("[]")})


@pytest.mark.parametrize(
    "content", ["{", "[]", "null", "{}x", '{"content": {}}', '{"content": 1, "checksum": 1}', '{"a": 1}', BARE]
)
def test_damaged_checksums_are_one_line(folder, content):
    (folder / "checksums.json").write_text(content)
    refused(read, folder, file=folder / "checksums.json")


@pytest.mark.parametrize(
    "content",
    [{"files": 1, "weights": {}}, {"files": {"a": 1}, "weights": {}}, {"files": {}, "weights": {"a": []}}]
    + [{"files": {}, "weights": {"a": {"header": "x", "tensors": {"b": "c"}}}}],
)
def test_checksums_of_another_form_are_one_line(folder, content):
    text = json.dumps(content, sort_keys=True)
    (folder / "checksums.json").write_text(json.dumps({"content": content, "checksum": files.checksum(text)}))
    assert "as latent_jax writes them" in refused(read, folder, file=folder / "checksums.json")


def test_stock_transformers_reads_the_folder_as_before(exported):
    loaded, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(exported, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert all(isinstance(json.loads(file.read_text()), dict) for file in exported.glob("*.json"))


def test_a_workdir_keeps_checksums_of_one_form_and_reads_the_earlier_one(exported, tmp_path):
    kept = tmp_path / "hf_files"
    keep_origin(exported, kept)
    known = json.loads((kept / "checksums.json").read_text())["content"]
    assert "config.json" in known["files"] and known["weights"] == {}
    (kept / "checksums.json").write_text(json.dumps(known["files"]))  # as it was before
    check_origin(kept)
    flip(kept / "config.json", 5)
    assert "model.path" in refused(check_origin, kept, file=kept / "config.json")


def test_damage_is_not_taken_into_a_new_workdir(folder, tmp_path):
    flip(folder / "tokenizer_config.json", 5)
    refused(keep_origin, folder, tmp_path / "kept", file=folder / "tokenizer_config.json")
    assert not (tmp_path / "kept").exists()


def test_the_shipped_model_is_checked_and_a_copy_of_it_is_there_to_be_changed(tmp_path):
    shipped = tmp_path / "assets" / TINY_VL.name
    shutil.copytree(TINY_VL.parent, shipped.parent)
    hf_io.load(hf_io.resolve(shipped))
    shutil.copytree(shipped, tmp_path / "mine")
    for directory in (shipped, tmp_path / "mine"):
        flip(directory / "model.safetensors", -1)
        flip(directory / "merges.txt", -2)
    assert "damaged" in refused(hf_io.resolve, shipped, file=shipped / "merges.txt")
    hf_io.load(hf_io.resolve(tmp_path / "mine"))
    shutil.copy(TINY_VL / "merges.txt", shipped)
    assert "damaged" in refused(hf_io.load, shipped, file=shipped / "model.safetensors")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, np.uint8])
def test_pieces_have_the_sum_of_the_whole(dtype):
    array = np.arange(30).reshape(6, 5).astype(dtype)
    crc = 0
    for piece in (array[:1], array[1:4], array[4:]):
        crc = sums.of_tensor(piece, crc)
    assert crc == sums.of_tensor(array) != sums.of_tensor(np.ascontiguousarray(array.T))
    assert sums.of_tensor(np.asfortranarray(array)) == crc
    assert isinstance(sums.of_tensor(np.asarray(array[0, 0])), int) and sums.of_tensor(array[:0]) == 0
