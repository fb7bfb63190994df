"""The facade's loading: heads and end tokens that do not fit are named, steps of a workdir load."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import latent_jax
from latent_jax import generate
from latent_jax.config import schema
from latent_jax.data.chat import Processor
from latent_jax.errors import UserError
from latent_jax.evaluation.answering import checksum
from latent_jax.inference.vlm import eos_ids
from latent_jax.methods import pretrain
from latent_jax.models import hf_export
from latent_jax.models.parameters import Structure
from latent_jax.runtime.checkpoints import Checkpoints
from latent_jax.training.state import new_model
from latent_jax.training.workdir import CHECKPOINTS, CONFIG, ORIGIN, split
from tests.reference import small

CONFIG_ = small.config()


def arrays(seed: int = 0) -> dict[str, np.ndarray]:
    config = dataclasses.replace(CONFIG_, seed=seed)
    make = lambda: new_model(config, pretrain.METHOD, small.model_config())
    structure = Structure.of(nnx.eval_shape(make))
    return jax.device_get(jax.jit(lambda: structure.arrays(make()))())


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """An export with its head; without checksums, since each test changes something on purpose."""
    out = tmp_path_factory.mktemp("exported") / "hf"
    vlm, head = split(arrays())
    latent = head, dataclasses.asdict(CONFIG_.latent)
    hf_export.save(out, vlm, small.model_config(), source=small.directory(), latent=latent)
    (out / "checksums.json").unlink()
    return out


@pytest.fixture
def folder(exported, tmp_path):
    shutil.copytree(exported, tmp_path / "hf")
    return tmp_path / "hf"


def change_head(directory, tensors=lambda head: None, latent=lambda settings: None):
    found, settings = hf_export.load_latent(directory)
    head = {name: np.array(tensor) for name, tensor in found.items()}
    tensors(head)
    latent(settings)
    (directory / WEIGHTS).unlink()
    hf_export.save_latent(directory, head, settings, [])


def test_a_head_imagines_in_the_shape_that_its_settings_tell(exported):
    assert latent_jax.load(exported).imagine("a red ball").shape == (CONFIG_.latent.grid**2, 64)


WEIGHTS, SETTINGS = "latent_head.safetensors", "latent_config.json"
HEADS = {
    "a tensor is missing": (dict(tensors=lambda h: h.pop("fc1")), WEIGHTS, "tensor 'fc1' is missing"),
    "one too many": (dict(tensors=lambda h: h.update(more=h["fc1"])), WEIGHTS, "tensor 'more' is none of the head"),
    "no slots": (dict(tensors=lambda h: h.pop("slots")), WEIGHTS, "tensor 'slots' is missing"),
    "one axis": (
        dict(tensors=lambda h: h.update(fc2=h["fc2"][0])), WEIGHTS, r"'fc2' is float32 \(64,\), expected \(128, 64\)",
    ),
    "another width": (dict(tensors=lambda h: h.update(fc1=h["fc1"][:, :-1])), WEIGHTS, "tensor 'fc1' is float32"),
    "whole numbers": (
        dict(tensors=lambda h: h.update(norm=h["norm"].astype(np.int32))), WEIGHTS, "'norm' is int32 .* of floats",
    ),
    "none at all": (dict(tensors=lambda h: h.clear()), WEIGHTS, "no such file, but the method 'pretrain' .* a head"),
    "not finite": (
        dict(tensors=lambda h: h["mean"].fill(np.nan)), WEIGHTS, "tensor 'mean' has values that are not finite",
    ),
    "another grid": (dict(latent=lambda s: s.update(grid=3)), WEIGHTS, r"is float32 \(4, 64\), expected \(9, 64\)"),
    "another space": (
        dict(latent=lambda s: s.update(space="encoder")), WEIGHTS, r"'fc1' is float32 .* expected \(64, 64\)",
    ),
    "an unknown readout": (dict(latent=lambda s: s.update(readout="x")), SETTINGS, "readout: got 'x'"),
    "a method's name": (dict(latent=lambda s: s.update(method="sft")), SETTINGS, "captions: no section of method"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "file", "fault"), HEADS.values(), ids=HEADS)
def test_a_head_that_does_not_fit_is_named(folder, changes, file, fault):
    change_head(folder, **changes)
    with pytest.raises(UserError, match=f"{folder / file}: .*{fault}") as caught:
        latent_jax.load(folder)
    assert "\n" not in str(caught.value)


def test_a_head_of_another_readout_is_read_as_it_was_trained(folder):
    change_head(folder, latent=lambda settings: settings.update(readout="mean_text"))
    vlm = latent_jax.load(folder)
    assert vlm.settings.latent.readout == "mean_text" and vlm.imagine("a red ball").shape == (4, 64)


def test_the_dtype_leaves_the_statistics_alone(exported):
    head = latent_jax.load(exported, dtype="bfloat16").model.head
    assert head.fc1[...].dtype == jnp.bfloat16 and head.mean[...].dtype == head.scale[...].dtype == jnp.float32


# ---------------------------------------------------------------- token ids


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("value", [10**6, [3, 10**6], -1, "3", [None], [], 2.0, True, 2**40])
def test_an_end_token_that_is_no_row_of_the_embedding_is_named(folder, name, value):
    (folder / "generation_config.json").unlink()
    content = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    (folder / name).write_text(json.dumps(content | {"eos_token_id": value}))
    with pytest.raises(UserError, match=f"{folder / name}: eos_token_id"):
        latent_jax.load(folder)


def test_the_last_row_may_end_a_reply_and_the_next_may_not(tmp_path):
    rows = small.model_config().text.vocab_size
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": [rows - 1, 0]}))
    assert eos_ids(tmp_path, None, rows) == (rows - 1, 0)
    with pytest.raises(UserError, match="eos_token_id"):
        eos_ids(tmp_path, None, rows - 1)


def test_a_token_without_a_row_is_named():
    processor, rows = small.processor(), small.model_config().text.vocab_size
    processor.check_rows(rows, "model")
    vocabulary = processor.tokenizer.backend_tokenizer.get_vocab(with_added_tokens=True)
    last = max(vocabulary.values())
    processor.check_rows(last + 1, "model")
    with pytest.raises(
        UserError, match=rf"^model: the tokenizer's .* has the id {last}, but the embedding has {last} rows"
    ):
        processor.check_rows(last, "model")


def test_a_tokenizer_with_tokens_beyond_the_embedding_does_not_load(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    with pytest.raises(UserError, match="but the embedding has 300 rows"):
        Processor.from_directory(folder)


# ---------------------------------------------------------------- workdirs


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Steps 1 and 2, of other weights each."""
    directory = tmp_path_factory.mktemp("run")
    schema.write(CONFIG_, directory / CONFIG)
    hf_export.keep_origin(small.directory(), directory / ORIGIN)
    with Checkpoints(directory / CHECKPOINTS) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, {"trainable": arrays(step)}, {})
    return directory


def test_a_workdir_is_its_newest_step_and_a_step_is_named_by_its_path(workdir):
    embed = lambda path: np.asarray(latent_jax.load(path).model.vlm.text.embed[...])
    newest, first = embed(workdir), embed(workdir / CHECKPOINTS / "1")
    np.testing.assert_array_equal(newest, arrays(2)["vlm.text.embed"])
    np.testing.assert_array_equal(embed(f"{workdir}/checkpoints/2/"), newest)
    np.testing.assert_array_equal(first, arrays(1)["vlm.text.embed"])


def test_generate_takes_a_step_and_names_one_that_is_not_there(workdir, capsys, monkeypatch):
    def run(step):
        flags = [f"--model={workdir / CHECKPOINTS / step}", "--prompt=What is it?", "--max_new_tokens=4"]
        monkeypatch.setattr("sys.argv", ["generate", *flags])
        generate.main()

    run("1")
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        run("7")
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1
    assert "no checkpoint of step 7; there are 1, 2" in error


def test_each_step_is_another_model_to_an_evaluation(workdir):
    found = [checksum(f"{workdir}/checkpoints/{step}") for step in (1, 2)]
    assert [one["step"] for one in found] == [1, 2] and found[0]["sha256"] != found[1]["sha256"]
    assert found[1] == checksum(str(workdir)) and found[0]["files"] > 3


def test_a_head_of_another_width_than_its_config_is_named(folder):
    change(folder / "latent_config.json", width=7)
    with pytest.raises(UserError, match=r"tensor 'fc1' is float32 \(64, 128\), expected \(64, 7\) of floats"):
        latent_jax.load(folder)


@pytest.mark.parametrize("nested", [False, True])
def test_a_conversation_longer_than_the_models_positions_is_refused(folder, nested):
    """The limit counts the whole prompt, and one of that length is still answered."""
    messages = [{"role": "user", "content": "What colour is the ball?"}]
    change(folder / "config.json", max_position_embeddings=4096)
    vlm = latent_jax.load(folder)
    length = len(vlm.prompts([messages]).examples[0].tokens)
    expected = vlm.generate([messages], 2)
    for positions in (length, length - 1):
        limit = {"max_position_embeddings": positions}
        change(folder / "config.json", **({"text_config": limit} if nested else limit))
        vlm = latent_jax.load(folder)
        if positions == length:
            assert vlm.generate([messages], 2) == expected
    with pytest.raises(UserError, match=f"has {length} tokens, expected at most {length - 1}, the max_position"):
        vlm.generate([messages], 2)


def change(file, **changes) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
