"""Loading: right values on any sharding and in any dtype, and one clear line for each broken checkpoint."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from latent_jax.errors import UserError
from latent_jax.models import hf_io
from latent_jax.models.qwen2_5_vl import hf_names
from latent_jax.models.qwen2_5_vl.config import from_json
from tests.models import tiny_hf


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tiny_hf.write(tmp_path_factory.mktemp("made") / "hf", dtype=torch.bfloat16)


@pytest.fixture
def broken(tmp_path):
    """A single-file checkpoint of its own for each test to break."""
    return tiny_hf.write(tmp_path / "hf")


@pytest.fixture
def small_pieces(monkeypatch):
    """Makes tiny weights large: every one of them takes many pieces."""
    monkeypatch.setattr(hf_io, "PIECE_BYTES", 100)


def reference(directory):
    """The slow obvious load: every tensor whole in float32, re-laid-out and stacked."""
    config = from_json(directory / "config.json")
    tensors = {hf_names.normalise(name): tensor.float().numpy() for name, tensor in tiny_hf.read(directory).items()}
    weights = {}
    for weight in hf_names.weights(config):
        layers = [weight.to_ours(tensors[name], config) for name in weight.names(config)]
        weights[weight.path] = np.stack(layers) if weight.stacked else layers[0]
    return weights


def assert_equal(loaded, expected):
    assert loaded.keys() == expected.keys()
    for path, array in loaded.items():
        np.testing.assert_array_equal(np.asarray(array, np.float32), expected[path], err_msg=path)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("new_names", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_loads_every_form_of_checkpoint(tmp_path, sharded, new_names, tied):
    directory = tiny_hf.write(tmp_path / "hf", tied=tied, sharded=sharded, new_names=new_names)
    assert (directory / "model.safetensors.index.json").exists() == sharded
    assert any(name.startswith("model.visual") for name in tiny_hf.read(directory)) == new_names
    loaded = hf_io.load(directory)
    assert ("text.lm_head" in loaded) == (not tied)
    shapes = hf_names.shapes(from_json(directory / "config.json"))
    assert {path: array.shape for path, array in loaded.items()} == shapes
    assert_equal(loaded, reference(directory))


def test_keeps_the_dtype_unless_told(made):
    assert {array.dtype for array in hf_io.load(made).values()} == {jnp.dtype(jnp.bfloat16)}
    assert {array.dtype for array in hf_io.load(made, dtype=jnp.float32).values()} == {jnp.dtype(jnp.float32)}
    by_path = hf_io.load(made, dtype={"text.blocks.q": "float32"})
    assert {path for path, array in by_path.items() if array.dtype == jnp.float32} == {"text.blocks.q"}
    assert_equal(by_path, reference(made))


def test_narrowing_rounds_to_nearest_even(broken, small_pieces):
    expected = {path: array.astype(ml_dtypes.bfloat16).astype(np.float32) for path, array in reference(broken).items()}
    assert_equal(hf_io.load(broken, dtype=jnp.bfloat16), expected)


def test_layers_of_different_dtypes_are_stacked_without_loss(broken):
    name = "model.layers.1.self_attn.q_proj.weight"
    tiny_hf.change(broken, lambda tensors: tensors.update({name: tensors[name].bfloat16()}))
    loaded = hf_io.load(broken)
    assert loaded["text.blocks.q"].dtype == jnp.float32
    assert_equal(loaded, reference(broken))


def test_piecewise_transfer_gives_the_same_arrays(made, small_pieces):
    assert_equal(hf_io.load(made), reference(made))


SPECS = {
    "text.blocks.q": P(None, "fsdp", "tp"),
    "text.blocks.o": P(None, "tp", None, "fsdp"),
    "text.embed": P("tp", "fsdp"),
    "vision.blocks.qkv": P(None, "fsdp", None, "tp"),
    "vision.patch": P(None, None, "fsdp"),
    "text.norm": P(),
}


@pytest.mark.parametrize("pieces", ["whole", "small_pieces"])
def test_each_device_gets_its_own_part(made, pieces, request):
    if pieces == "small_pieces":
        request.getfixturevalue(pieces)
    mesh = jax.make_mesh((2, 2, 2), ("replica", "fsdp", "tp"))
    shardings = {path: NamedSharding(mesh, spec) for path, spec in SPECS.items()}
    loaded, expected = hf_io.load(made, shardings=shardings), reference(made)
    assert_equal(loaded, expected)
    for path, sharding in shardings.items():
        assert loaded[path].sharding == sharding
        for shard in loaded[path].addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data, np.float32), expected[path][shard.index])


def test_loads_inside_a_mesh_context(made, small_pieces):
    mesh = jax.make_mesh((2, 4), ("fsdp", "tp"))
    with jax.set_mesh(mesh):
        loaded = hf_io.load(made, shardings={"text.embed": NamedSharding(mesh, P("tp", "fsdp"))})
    assert_equal(loaded, reference(made))


def test_reads_only_the_indexed_part(made, monkeypatch):
    """The host never assembles more than was asked for."""
    weight = hf_io.Checkpoint.open(made).weights(from_json(made / "config.json"))["text.blocks.gate"]
    copied = []
    monkeypatch.setattr(
        hf_io,
        "copy_in_order",
        lambda view, out=None, copy=hf_io.copy_in_order: (copied.append(view.shape), copy(view, out))[1],
    )
    part = weight[1:3, 4:8, ::1]
    np.testing.assert_array_equal(part.astype(np.float32), reference(made)["text.blocks.gate"][1:3, 4:8])
    assert copied == [(4, 20), (4, 20)]


def test_pieces_cover_an_array_once_and_stay_small(monkeypatch):
    monkeypatch.setattr(hf_io, "PIECE_BYTES", 96)
    for shape in [(), (5,), (100,), (3, 7), (2, 3, 50), (4, 1, 6, 2)]:
        count = np.zeros(shape, int)
        for piece in hf_io._pieces(shape, 4):
            count[piece] += 1
            assert count[piece].size * 4 <= 96
        assert (count == 1).all()


def test_an_equal_lm_head_beside_tied_embeddings_is_left_out(tmp_path):
    directory = tiny_hf.write(tmp_path / "hf", tied=True)
    tie = lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    tiny_hf.change(directory, tie)
    assert "text.lm_head" not in hf_io.load(directory)


def test_a_different_lm_head_beside_tied_embeddings_is_an_error(tmp_path):
    directory = tiny_hf.write(tmp_path / "hf", tied=True)
    untie = lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] + 1})
    tiny_hf.change(directory, untie)
    with pytest.raises(UserError, match=r"ties the word embeddings, but lm_head\.weight differs"):
        hf_io.load(directory)


def pop(*names):
    return lambda tensors: [tensors.pop(name) for name in names]


NORM = "model.norm.weight"
BREAKS = [
    (pop(NORM), r"hf: tensor 'model\.norm\.weight' is missing$"),
    (pop(NORM, "visual.merger.ln_q.weight"), r"tensor 'model\.norm\.weight' is missing \(and 1 more\)"),
    (lambda t: t.update(extra=torch.zeros(2)), r"model\.safetensors: unexpected tensor 'extra'$"),
    (lambda t: t.update({NORM: torch.zeros(7)}), r"'model\.norm\.weight' has shape \(7,\), expected \(24,\)"),
    (lambda t: t.update({NORM: t[NORM].int()}), r"'model\.norm\.weight' has dtype int32, expected float32"),
    (lambda t: t.update({"model.language_model.norm.weight": t[NORM].clone()}), r"'model\.norm\.weight' is already in"),
]


@pytest.mark.parametrize(("edit", "message"), BREAKS)
def test_a_wrong_set_of_tensors_is_named(broken, edit, message):
    tiny_hf.change(broken, edit)
    with pytest.raises(UserError, match=message) as caught:
        hf_io.load(broken)
    assert "\n" not in str(caught.value)


def test_a_truncated_shard_is_named(broken):
    path = broken / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"model\.safetensors: truncated: \d+ bytes, expected \d+"):
        hf_io.load(broken)


def test_a_missing_shard_is_named(tmp_path):
    directory = tiny_hf.write(tmp_path / "hf", sharded=True)
    shard = sorted(directory.glob("model-00002-*"))[0]
    shard.unlink()
    with pytest.raises(UserError, match=rf"{shard.name}: missing; model\.safetensors\.index\.json names it"):
        hf_io.load(directory)


INDEX_BREAKS = [
    (lambda index: index["weight_map"].update(ghost=index["weight_map"][NORM]), r"tensor 'ghost' is missing, model"),
    (lambda index: index["weight_map"].update({NORM: "../elsewhere.safetensors"}), "expected a file name"),
    (lambda index: index["weight_map"].update({NORM: ""}), r"index\.json: .* is put in '', expected a file name"),
    (lambda index: index["weight_map"].update({NORM: "x" * 5000}), r"is put in 'x{99}\.\.\., expected a file name"),
    (lambda index: index.pop("weight_map"), r"index\.json: expected JSON with a 'weight_map'"),
    (lambda index: index.update(weight_map=[1]), r"index\.json: expected JSON with a 'weight_map'"),
]


@pytest.mark.parametrize(("edit", "message"), INDEX_BREAKS)
def test_a_wrong_index_is_named(tmp_path, edit, message):
    directory = tiny_hf.write(tmp_path / "hf", sharded=True)
    path = directory / "model.safetensors.index.json"
    tiny_hf.change_json(path, edit)
    with pytest.raises(UserError, match=message):
        hf_io.load(directory)


def test_an_index_that_is_not_json_is_named(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(UserError, match=r"index\.json: expected JSON"):
        hf_io.Checkpoint.open(tmp_path)


def test_a_directory_without_weights_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({}))
    with pytest.raises(UserError, match=r"not a checkpoint directory; expected model\.safetensors or"):
        hf_io.load(tmp_path)


def test_a_path_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such directory; expected a checkpoint directory or a hub id"):
        hf_io.resolve(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: a file; expected a checkpoint directory"):
        hf_io.resolve(tmp_path / "file")


def test_a_hub_id_is_downloaded_and_its_failure_is_one_line(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: asked.append(name) or str(tmp_path))
    assert hf_io.resolve("Qwen/Qwen2.5-VL-3B-Instruct") == tmp_path
    assert asked == ["Qwen/Qwen2.5-VL-3B-Instruct"]

    def offline(name, **_):
        raise OSError("the hub is out of reach\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(UserError, match="^Qwen/X: no such directory, .* did not give it: the hub is out of reach$"):
        hf_io.resolve("Qwen/X")
