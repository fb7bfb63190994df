"""Export: bit-equal round trips, what stands beside the weights, and destinations that are whole or untouched."""

import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from transformers import Qwen2_5_VLForConditionalGeneration

from latent_jax.errors import UserError, os_error
from latent_jax.models import hf_export, hf_io
from latent_jax.models.qwen2_5_vl import hf_names
from latent_jax.models.qwen2_5_vl.config import from_json
from tests.models import tiny_hf


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tiny_hf.write(tmp_path_factory.mktemp("made") / "hf", dtype=torch.bfloat16)


def published(directory):
    return {hf_names.normalise(name): tensor for name, tensor in tiny_hf.read(directory).items()}


def export(source, output, *, load=None, **options):
    config = from_json(source / "config.json")
    hf_export.save(output, hf_io.load(source, **(load or {})), config, source=source, **options)
    return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("sharded", "new_names"), [(False, False), (True, True), (False, True)])
def test_round_trip_is_bit_equal(tmp_path, dtype, tied, sharded, new_names):
    source = tiny_hf.write(tmp_path / "a", dtype=dtype, tied=tied, sharded=sharded, new_names=new_names)
    output = export(source, tmp_path / "b", max_shard_bytes=9000 if sharded else None)
    assert tiny_hf.same_bits(tiny_hf.read(output), published(source))
    # Always an index: without one, clients take every *.safetensors of the directory for weights.
    assert (output / "model.safetensors.index.json").exists()
    assert (output / "model.safetensors").exists() != sharded
    for file in ("config.json", "generation_config.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (output / file).read_bytes() == (source / file).read_bytes()


@pytest.mark.parametrize("tied", [False, True])
def test_stock_transformers_loads_an_export(tmp_path, tied):
    source = tiny_hf.write(tmp_path / "a", tied=tied, dtype=torch.bfloat16)
    output = export(source, tmp_path / "b", max_shard_bytes=20_000)
    loaded, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(output, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = tiny_hf.model(tied=tied, dtype=torch.bfloat16)
    assert tiny_hf.same_bits(dict(loaded.state_dict()), dict(expected.state_dict()))


def test_masters_in_float32_go_back_to_the_sources_dtype(made, tmp_path):
    output = export(made, tmp_path / "b", load={"dtype": jnp.float32})
    assert tiny_hf.same_bits(tiny_hf.read(output), published(made))


def test_each_tensor_keeps_its_own_dtype(tmp_path):
    source = tiny_hf.write(tmp_path / "a")
    name = "model.layers.1.mlp.up_proj.weight"
    tiny_hf.change(source, lambda tensors: tensors.update({name: tensors[name].bfloat16()}))
    assert tiny_hf.same_bits(tiny_hf.read(export(source, tmp_path / "b")), published(source))


def test_a_dtype_that_is_told_is_written_and_stated(made, tmp_path):
    config = json.loads((made / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    output = export(made, tmp_path / "b", dtype=jnp.float32)
    assert tiny_hf.same_bits(tiny_hf.read(output), {name: t.float() for name, t in published(made).items()})
    assert json.loads((output / "config.json").read_text()) == config | {"dtype": "float32"}
    assert Qwen2_5_VLForConditionalGeneration.from_pretrained(output).dtype == torch.float32


def test_a_dtype_stated_in_published_style_is_restated(tmp_path):
    (tmp_path / "config.json").write_text('{"torch_dtype": "bfloat16", "vision_config": {"torch_dtype": "bfloat16"}}')
    hf_export._restate_dtype(tmp_path / "config.json", np.dtype(np.float32))
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "torch_dtype": "float32",
        "vision_config": {"torch_dtype": "float32"},
    }


@pytest.mark.parametrize("context", ["none", "mesh"])
def test_sharded_arrays_are_gathered_tensor_by_tensor(made, tmp_path, context, monkeypatch):
    monkeypatch.setattr(hf_export, "PIECE_BYTES", 500)  # the embeddings take several pieces
    mesh = jax.make_mesh((2, 2, 2), ("replica", "fsdp", "tp"))
    specs = {
        "text.embed": P("tp", "fsdp"),
        "text.blocks.q": P(None, "fsdp", "tp"),
        "text.lm_head": P(("fsdp", "tp")),
        "text.blocks.down": P(None, "tp", "fsdp"),
        "vision.blocks.qkv": P("tp"),
        "text.norm": P(),
    }
    load = {"shardings": {path: NamedSharding(mesh, spec) for path, spec in specs.items()}}
    if context == "none":
        output = export(made, tmp_path / "b", load=load)
    else:
        with jax.set_mesh(mesh):
            output = export(made, tmp_path / "b", load=load)
    assert tiny_hf.same_bits(tiny_hf.read(output), published(made))


def test_shards_stay_under_the_limit_and_the_index_is_true(made, tmp_path):
    output = export(made, tmp_path / "b", max_shard_bytes=5000)
    index = json.loads((output / "model.safetensors.index.json").read_text())
    tensors = tiny_hf.read(output)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    shards = {}
    for name, file in index["weight_map"].items():
        shards.setdefault(file, []).append(tensors[name].nbytes)
    assert index["weight_map"].keys() == tensors.keys()
    assert shards.keys() == {file.name for file in output.glob("*.safetensors")}
    assert all(sum(sizes) <= 5000 or len(sizes) == 1 for sizes in shards.values())
    assert sorted(shards) == [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]


def test_one_file_stays_one_and_shards_stay_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(hf_export, "MAX_SHARD_BYTES", 9000)
    single = export(tiny_hf.write(tmp_path / "a"), tmp_path / "b")
    shards = export(tiny_hf.write(tmp_path / "c", sharded=True), tmp_path / "d")
    assert [file.name for file in single.glob("*.safetensors")] == ["model.safetensors"]
    assert len(list(shards.glob("*.safetensors"))) > 1


@pytest.mark.parametrize("sharded", [False, True])
def test_a_workdirs_record_stands_in_for_the_source(tmp_path, sharded, monkeypatch):
    monkeypatch.setattr(hf_export, "MAX_SHARD_BYTES", 9000)
    source = tiny_hf.write(tmp_path / "a", dtype=torch.bfloat16, sharded=sharded)
    hf_export.keep_origin(source, tmp_path / "run" / "hf_files")
    masters = hf_io.load(source, dtype=jnp.float32)
    config = from_json(tmp_path / "run" / "hf_files" / "config.json")
    hf_export.save(tmp_path / "b", masters, config, source=tmp_path / "run" / "hf_files")
    assert tiny_hf.same_bits(tiny_hf.read(tmp_path / "b"), published(source))
    assert (tmp_path / "b" / "chat_template.jinja").exists()
    assert not (tmp_path / "b" / "tensors.json").exists()
    assert (tmp_path / "b" / "model.safetensors").exists() == (not sharded)


def test_without_weights_or_record_the_stated_dtype_holds(made, tmp_path):
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_bytes((made / "config.json").read_bytes())
    arrays = hf_io.load(made, dtype=jnp.float32)
    hf_export.save(tmp_path / "b", arrays, from_json(made / "config.json"), source=tmp_path / "bare")
    assert tiny_hf.same_bits(tiny_hf.read(tmp_path / "b"), published(made))
    hf_export.save(tmp_path / "c", arrays, from_json(made / "config.json"))
    assert {tensor.dtype for tensor in tiny_hf.read(tmp_path / "c").values()} == {torch.float32}


LATENT = {"slots": np.ones((4, 3), np.float32), "fc1": np.full((2, 2), 3, ml_dtypes.bfloat16), "scale": np.float32(2)}


def test_latent_tensors_stand_beside_the_weights_and_travel_on(made, tmp_path):
    settings = {"grid": 2, "readout": "slots", "rate": 0.5}
    first = export(made, tmp_path / "b", latent=(LATENT, settings))
    for directory in (first, export(first, tmp_path / "c")):
        tensors, config = hf_export.load_latent(directory)
        assert config == settings
        assert tensors.keys() == LATENT.keys()
        for name, tensor in LATENT.items():
            assert tensors[name].dtype == tensor.dtype
            np.testing.assert_array_equal(tensors[name], tensor)
    assert hf_export.load_latent(made) is None
    _, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(first, output_loading_info=True)
    assert not report["unexpected_keys"]


def test_a_head_without_its_settings_is_an_error_and_settings_alone_are_not(made, tmp_path):
    """Not every method that thinks before an answer has a head; whether one is missing, its method knows."""
    hf_export.save_latent(tmp_path, LATENT, {})
    (tmp_path / "latent_config.json").unlink()
    missing = r"latent_config\.json: no such file, but latent_head\.safetensors stands beside it"
    with pytest.raises(UserError, match=missing):
        hf_export.load_latent(tmp_path)
    output = export(made, tmp_path / "b", latent=({}, {"method": "one"}))
    assert not (output / "latent_head.safetensors").exists()
    assert hf_export.load_latent(output) == ({}, {"method": "one"})
    assert hf_export.load_latent(export(output, tmp_path / "c")) == ({}, {"method": "one"})


def test_an_earlier_export_is_replaced_whole(made, tmp_path):
    export(made, tmp_path / "b", max_shard_bytes=5000, latent=(LATENT, {}))
    output = export(made, tmp_path / "b")
    assert {file.name for file in output.iterdir()} == {
        "model.safetensors",
        "model.safetensors.index.json",
        "config.json",
        "generation_config.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "checksums.json",
    }
    assert [entry.name for entry in tmp_path.iterdir()] == ["b"]


def test_foreign_files_are_never_deleted(made, tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"b: holds 'thesis\.tex', which no export writes; expected a new or empty"):
        export(made, tmp_path / "b")
    assert [entry.name for entry in (tmp_path / "b").iterdir()] == ["thesis.tex"]
    with pytest.raises(UserError, match=r"thesis\.tex: a file; expected a directory"):
        export(made, tmp_path / "b" / "thesis.tex")


def test_the_source_is_never_replaced(made):
    with pytest.raises(UserError, match="would replace its own source"):
        export(made, made)


def test_an_export_that_fails_leaves_the_earlier_one(made, tmp_path, monkeypatch):
    output = export(made, tmp_path / "b")
    before = {file.name: file.read_bytes() for file in output.iterdir()}

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(hf_export, "_index", fail)
    with pytest.raises(OSError, match="disk full"):
        export(made, output, max_shard_bytes=5000)
    assert {file.name: file.read_bytes() for file in output.iterdir()} == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["b"]


def test_weights_of_another_model_are_refused(made, tmp_path):
    arrays = hf_io.load(made)
    arrays["text.bloks.q"] = arrays.pop("text.blocks.q")
    with pytest.raises(ValueError, match=r"weights missing, or not of this model: text\.blocks\.q, text\.bloks\.q"):
        hf_export.save(tmp_path / "b", arrays, from_json(made / "config.json"))


def test_nothing_is_exported_into_its_source(made):
    with pytest.raises(UserError, match="would stand inside its own source"):
        export(made, made / "new")
    assert not (made / "new").exists()


@pytest.mark.parametrize("name", ["config.json", "LICENSE", "tokenizer.json"])
def test_a_folder_without_weights_is_no_export_to_replace(made, tmp_path, name):
    (tmp_path / "b").mkdir()
    for file in (name, "README.md"):
        (tmp_path / "b" / file).write_text("mine")
    with pytest.raises(UserError, match=rf"b: holds '{name}' and no weights, so it is no export"):
        export(made, tmp_path / "b")
    assert (tmp_path / "b" / name).read_text() == "mine"


@pytest.mark.parametrize("lost", ["model.safetensors", "model.safetensors.index.json", "checksums.json"])
def test_an_export_that_lost_a_file_is_one_to_replace(made, tmp_path, lost):
    output = export(made, tmp_path / "b")
    (output / lost).unlink()
    assert (export(made, output) / lost).exists()


def test_a_folder_under_the_name_of_a_file_is_not_deleted(made, tmp_path):
    output = export(made, tmp_path / "b")
    (output / "tokenizer.model").mkdir()
    (output / "tokenizer.model" / "thesis.tex").touch()
    with pytest.raises(UserError, match="holds 'tokenizer.model', which no export writes"):
        export(made, output)
    assert (output / "tokenizer.model" / "thesis.tex").exists()


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("generation_config.json", lambda file: file.write_text('{"eos'), "cannot be read as JSON"),
        ("tokenizer_config.json", lambda file: file.write_text("[]"), "got a list"),
        ("merges.txt", lambda file: file.symlink_to("nowhere"), "no such file"),
        ("vocab.json", os.mkfifo, "not a regular file"),
        ("LICENSE", Path.mkdir, "not a regular file"),
    ],
)
def test_what_is_copied_is_looked_at_first(tmp_path, name, spoil, message):
    source = tiny_hf.write(tmp_path / "hf")
    (source / name).unlink(missing_ok=True)
    spoil(source / name)
    with pytest.raises((UserError, OSError)) as caught:
        export(source, tmp_path / "b")
    line = str(caught.value) if isinstance(caught.value, UserError) else os_error(caught.value)
    assert line.startswith(f"{source / name}: ") and message in line
    assert [entry.name for entry in tmp_path.iterdir()] == ["hf"]
