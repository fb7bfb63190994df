"""Frozen networks of a method: from a file or from the model, never trained, kept by checkpoints.

`Toy` is fine-tuning whose head holds a file's matrix in bfloat16, a copy of the output matrix, and one that learns.
"""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import latent_jax
from latent_jax import train
from latent_jax.config.fields import option
from latent_jax.data.builders.build import build_scenes
from latent_jax.errors import UserError
from latent_jax.methods import sft
from latent_jax.methods.contract import Method, Think
from latent_jax.models import hf_export, tensor_files
from latent_jax.models.frozen import ModelCopy, TensorFile
from latent_jax.models.parameters import Declare
from latent_jax.runtime import sharding
from latent_jax.runtime.checkpoints import Checkpoints
from latent_jax.training.latent_config import saved_head
from latent_jax.training.state import check_frozen, first_state, make_setup
from tests.reference import small

NAME = "tests.training.test_frozen"


@dataclasses.dataclass(frozen=True)
class Toy:
    file: str = option("", "safetensors file of the decoder")


class Head(nnx.Module):
    def __init__(self, model_config, rngs: nnx.Rngs):
        text = model_config.text
        sizes = dict(D=text.hidden_size, V=text.vocab_size, F=8)
        declare, half = Declare(sizes, rngs, jnp.float32), Declare(sizes, rngs, jnp.bfloat16)
        self.mix = declare.normal("D F", "D")
        self.decoder = half.normal("F D", "F")
        self.output = declare.normal("V D", "D")


def loss(model, batch, config):
    options = dict(remat=config.model.remat, unroll=config.model.unroll)
    assert model.head.decoder[...].dtype == jnp.bfloat16
    merged, _, _ = model.vlm.encode(batch, image_patches=config.data.image_patches, **options)
    x = model.vlm.embed(batch["tokens"], batch["feature_index"], merged)
    added = jnp.einsum("...D,DF,FE->...E", x, model.head.mix[...], model.head.decoder[...].astype(x.dtype))
    return sft.scored(model, x + added + 0 * model.head.output[...].sum(), batch, options)


@dataclasses.dataclass(frozen=True)
class ToyConfig(sft.SftConfig):
    toy: Toy = Toy()


METHOD = Method(
    config=ToyConfig,
    layout=sft.layout,
    coefficients=sft.coefficients,
    weights=sft.weights,
    loss=loss,
    build_head=lambda model_config, config, rngs: Head(model_config, rngs),
    frozen=lambda config: {
        "head.decoder": TensorFile(config.toy.file, "config.toy.file").tensor("decoder.weight", np.transpose),
        "head.output": ModelCopy("vlm.text.lm_head", "vlm.text.embed"),
    },
    exported=lambda path: path != "output",
    think=Think(lambda config: 1, lambda *_: [], lambda *_: None),
)

DECODER = np.random.default_rng(0).normal(size=(64, 8)).astype(ml_dtypes.bfloat16)  # as the file has it: (D, F)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return written(tmp_path_factory.mktemp("frozen") / "decoder.safetensors", {"decoder.weight": DECODER})


def written(path, tensors):
    tensor_files.write(path, {name: tensor_files.Entry.of(array) for name, array in tensors.items()})
    return path


def config_of(file, **sections):
    return small.config(NAME, **{"toy": dict(file=str(file)), "chat": dict(questions=1), **sections})


def setup_of(config, mesh=(1, 1, 1), dtypes=None):
    mesh = sharding.make_mesh(*mesh, jax.devices()[: np.prod(mesh)])
    return make_setup(config, METHOD, small.model_config(), mesh, dtypes or {})


# ---------------------------------------------------------------- the first state


def test_they_come_from_the_file_and_from_the_model_on_any_mesh(file):
    setup = setup_of(config_of(file), (1, 2, 2))
    state = first_state(setup, "")
    assert {path for path in setup.trainable if path.startswith("head.")} == {"head.mix"}
    decoder, output = state.frozen["head.decoder"], state.frozen["head.output"]
    assert decoder.dtype == jnp.bfloat16 and decoder.sharding == setup.sharding("head.decoder")
    np.testing.assert_array_equal(decoder, DECODER.T)
    np.testing.assert_array_equal(output, state.trainable["vlm.text.lm_head"])
    shapes = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree) for tree in (state, setup.abstract())]
    assert shapes[0] == shapes[1]
    assert not any("decoder" in str(path) for path, _ in jax.tree_util.tree_leaves_with_path(state.opt_state))


def test_all_else_begins_as_it_does_without_them(file):
    with_them = first_state(setup_of(config_of(file)), "")
    mesh = sharding.make_mesh(1, 1, 1, jax.devices()[:1])
    drawn = dataclasses.replace(METHOD, frozen=lambda config: {})
    without = first_state(make_setup(config_of(file), drawn, small.model_config(), mesh, {}), "")
    for path, array in with_them.trainable.items():
        np.testing.assert_array_equal(array, without.trainable[path], err_msg=path)


def test_a_copy_has_the_checkpoints_dtype_and_memory_of_its_own(file):
    setup = setup_of(config_of(file), dtypes={"vlm.text.lm_head": jnp.dtype(jnp.bfloat16)})
    assert setup.abstract().frozen["head.output"].dtype == jnp.bfloat16
    assert setup.abstract().trainable["vlm.text.lm_head"].dtype == jnp.float32
    state = first_state(setup_of(config_of(file)), "")
    places = [a.unsafe_buffer_pointer() for a in (state.frozen["head.output"], state.trainable["vlm.text.lm_head"])]
    assert places[0] != places[1]


def test_a_tied_models_output_matrix_is_its_embedding():
    like = jax.ShapeDtypeStruct((3, 2), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    copy = ModelCopy("vlm.text.lm_head", "vlm.text.embed")
    np.testing.assert_array_equal(copy("head.output", like, {"vlm.text.embed": jnp.ones((3, 2))}), np.ones((3, 2)))
    with pytest.raises(ValueError, match="head.output: a copy of .*the model has none of them"):
        copy("head.output", like, {})


def test_nothing_is_read_before_the_first_state():
    """`plan` counts bytes where the file is not."""
    frozen = setup_of(config_of("/nowhere/at.all")).abstract().frozen
    assert (frozen["head.decoder"].shape, frozen["head.decoder"].dtype) == ((8, 64), jnp.bfloat16)


# ---------------------------------------------------------------- what is wrong with a file


@pytest.mark.parametrize(
    ("tensors", "fault"),
    [
        ({"other": DECODER}, r"tensor 'decoder.weight' is missing; head.decoder is loaded from it"),
        ({"decoder.weight": DECODER.T}, r"is bfloat16 \(8, 64\), expected what fits head.decoder: bfloat16 \(8, 64\)"),
        ({"decoder.weight": DECODER.astype(np.float32)}, r"is float32 \(64, 8\), expected what fits head.decoder"),
        ({"decoder.weight": DECODER.astype(np.int32)}, r"is int32 \(64, 8\), expected what fits head.decoder"),
    ],
)
def test_a_wrong_tensor_is_named_before_a_run_is_begun(tensors, fault, tmp_path):
    file = written(tmp_path / "wrong.safetensors", tensors)
    with pytest.raises(UserError, match=rf"wrong\.safetensors: .*{fault}"):
        check_frozen(config_of(file), METHOD, small.model_config())


def test_a_missing_file_is_named_before_a_workdir_is_made(tmp_path):
    for named, fault in ((tmp_path / "gone", "gone: no such file"), ("", "config.toy.file: got '', expected")):
        with pytest.raises(UserError, match=fault):
            train.run(config_of(named, mesh=dict(replica=1, fsdp=8)), tmp_path / "run")
        assert not (tmp_path / "run" / "config.json").exists()


def test_a_number_that_is_none_is_named(tmp_path):
    broken = DECODER.copy()
    broken[3, 4] = np.nan
    file = written(tmp_path / "nan.safetensors", {"decoder.weight": broken})
    with pytest.raises(UserError, match=r"nan\.safetensors: tensor 'decoder.weight' has values that are not finite"):
        first_state(setup_of(config_of(file)), "")


def test_a_path_that_the_head_has_not_is_the_methods_fault(file):
    wrong = dataclasses.replace(METHOD, frozen=lambda config: {"head.none": ModelCopy("vlm.text.embed")})
    with pytest.raises(UserError, match="'head.none' is no path of its head"):  # of a method of one's own: one line
        check_frozen(config_of(file), wrong, small.model_config())


# ---------------------------------------------------------------- a run


@pytest.fixture(scope="module")
def made(file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("frozen_run")
    build_scenes(folder / "prepared", sizes={"train": 24, "validation": 4})
    own = shutil.copy(file, folder / "own.safetensors")
    config = config_of(
        own,
        data=dict(name="scenes_questions", path=str(folder / "prepared"), image_patches=0, sample=16),
        mesh=dict(replica=2, fsdp=4),
        train=dict(steps=2, batch_size=8, warmup=0.0),
        checkpoint=dict(every=1, keep=0),
    )
    train.run(config, folder / "run")
    own.unlink()  # what follows needs it no more
    return config, folder / "run"


def arrays(directory, step):
    with Checkpoints(directory / "checkpoints", read_only=True) as checkpoints:
        return {**checkpoints.restore_item(step, "trainable"), **checkpoints.restore_item(step, "frozen")}


def test_they_do_not_move_while_the_rest_learns(made):
    first, second = (arrays(made[1], step) for step in (1, 2))
    for path in ("head.decoder", "head.output"):
        np.testing.assert_array_equal(first[path], second[path], err_msg=path)
    np.testing.assert_array_equal(second["head.decoder"], DECODER.T)
    assert second["head.decoder"].dtype == jnp.bfloat16
    for path in ("head.mix", "vlm.text.lm_head"):
        assert not np.array_equal(first[path], second[path]), path
    assert not np.array_equal(second["head.output"], second["vlm.text.lm_head"])


def test_a_resumed_run_needs_no_file(made, tmp_path):
    config, directory = made
    shutil.copytree(directory, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "2")
    (tmp_path / "run" / "finished.json").unlink()
    train.run(config, tmp_path / "run")
    for path, array in arrays(directory, 2).items():
        np.testing.assert_array_equal(arrays(tmp_path / "run", 2)[path], array, err_msg=path)


def test_an_export_holds_what_inference_needs_in_its_own_dtype(made):
    tensors, _ = hf_export.load_latent(made[1] / "hf")
    assert tensors.keys() == {"mix", "decoder"} and tensors["decoder"].dtype == jnp.bfloat16
    for path in (made[1] / "hf", made[1]):
        model = latent_jax.load(path, dtype="float32").model
        assert model.head.decoder[...].dtype == jnp.bfloat16 and model.head.mix[...].dtype == jnp.float32
        np.testing.assert_array_equal(model.head.decoder[...], DECODER.T)
        assert not hasattr(model.head, "output")


def test_a_saved_head_does_not_stand_in_for_the_file(made, tmp_path):
    other = written(tmp_path / "other.safetensors", {"decoder.weight": DECODER * 2})
    config = config_of(other, model=dict(init="checkpoint", path=str(made[1] / "hf")))
    setup = setup_of(config)
    state = first_state(setup, made[1] / "hf", saved_head(setup, made[1] / "hf"))
    np.testing.assert_array_equal(state.frozen["head.decoder"], DECODER.T * 2)
    np.testing.assert_array_equal(state.trainable["head.mix"], arrays(made[1], 2)["head.mix"])
