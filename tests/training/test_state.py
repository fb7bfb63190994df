"""The first state: what is trained, in which dtype, where it lives, and what a saved latent head may be."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_jax.errors import UserError
from latent_jax.methods import pretrain, sft
from latent_jax.models import hf_export, hf_io
from latent_jax.runtime import sharding
from latent_jax.training.latent_config import saved_head
from latent_jax.training.state import choose_attention, first_state, make_setup
from tests.reference import small


def setup(config, mesh=(1, 1, 1), dtypes=None, method=pretrain.METHOD):
    mesh = sharding.make_mesh(*mesh, jax.devices()[: np.prod(mesh)])
    return make_setup(config, method, small.model_config(), mesh, dtypes or {})


@pytest.fixture(scope="module")
def made():
    return jax.device_get(first_state(setup(small.config()), ""))


@pytest.fixture(scope="module")
def checkpoint(made, tmp_path_factory):
    """The random weights in bfloat16, with their head beside them."""
    directory = tmp_path_factory.mktemp("saved") / "hf"
    arrays = {**made.trainable, **made.frozen}
    vlm = {p.removeprefix("vlm."): a for p, a in arrays.items() if p.startswith("vlm.")}
    head = {p.removeprefix("head."): a + 1 for p, a in arrays.items() if p.startswith("head.")}
    latent = head, dataclasses.asdict(small.config().latent)
    hf_export.save(directory, vlm, small.model_config(), source=small.directory(), dtype=jnp.bfloat16, latent=latent)
    return directory


def loaded_config(**sections):
    return small.config(model={"init": "checkpoint"}, **sections)


def loaded(ready, directory):
    return first_state(ready, directory, saved_head(ready, directory))


def stored(directory) -> dict:
    weights = hf_io.Checkpoint.open(directory).weights(small.model_config())
    return {f"vlm.{path}": weight.dtype for path, weight in weights.items()}


def test_the_vision_tower_and_the_statistics_are_frozen_and_the_head_is_not(made):
    assert {path for path in made.frozen if not path.startswith("vlm.vision.")} == {"head.mean", "head.scale"}
    assert {path.split(".")[1] for path in made.trainable if path.startswith("vlm.")} == {"text"}
    assert {"head.slots", "head.fc1", "head.logit_scale"} <= made.trainable.keys()
    everything = setup(small.config(model={"trainable": "all"}))
    assert set(everything.structure.variables) - set(everything.trainable) == {"head.mean", "head.scale"}
    assert not [path for path in setup(small.config("sft"), method=sft.METHOD).trainable if path.startswith("head.")]


def test_random_weights_are_those_of_the_seed_on_any_mesh(made):
    other = first_state(setup(small.config(), (1, 2, 2)), "")
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(other), made)
    q = other.trainable["vlm.text.blocks.q"]
    assert q.addressable_shards[0].data.shape == (2, 32, 2, 16)


def test_masters_are_fp32_and_frozen_weights_keep_the_checkpoints_dtype(made, checkpoint):
    ready = setup(loaded_config(), dtypes=stored(checkpoint))
    state = loaded(ready, checkpoint)
    assert {a.dtype for a in state.trainable.values()} == {jnp.dtype("float32")}
    assert {a.dtype for p, a in state.frozen.items() if p.startswith("vlm.")} == {jnp.dtype("bfloat16")}
    for path, array in {**state.trainable, **state.frozen}.items():
        was = made.trainable.get(path, made.frozen.get(path))
        want = was + 1 if path.startswith("head.") else np.asarray(was, jnp.bfloat16)
        np.testing.assert_array_equal(np.asarray(array, np.float32), np.asarray(want, np.float32), err_msg=path)
    shapes = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree) for tree in (state, ready.abstract())]
    assert shapes[0] == shapes[1]


def test_a_saved_head_of_another_shape_is_an_error_not_a_new_head(checkpoint):
    bigger = setup(loaded_config(latent={"grid": 3}), dtypes=stored(checkpoint))
    with pytest.raises(UserError, match=r"latent head's slots is of shape \(4, 64\), expected shape \(9, 64\); set"):
        loaded(bigger, checkpoint)


@pytest.mark.parametrize(
    ("latent", "fault"),
    [
        ({"readout": "mean_text"}, "has latent.readout 'slots', but config.latent.readout is 'mean_text'"),
        ({"grid": 2, "space": "merged"}, ""),
        ({"scale": "std", "captions": "first"}, ""),  # what the saved head does not depend on
    ],
)
def test_a_saved_head_is_of_the_readout_and_space_that_the_run_asks_for(checkpoint, latent, fault):
    ready = setup(loaded_config(latent=latent), dtypes=stored(checkpoint))
    if not fault:
        loaded(ready, checkpoint)
        return
    with pytest.raises(UserError, match=rf"latent_config\.json: the head {fault}; expected the same"):
        loaded(ready, checkpoint)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda head: head.pop("fc1"), r"the latent head's fc1 is missing, expected shape"),
        (lambda head: head.update(mean=head["mean"][:-1]), r"the latent head's mean is of shape \(63,\), expected"),
    ],
)
def test_a_saved_head_without_a_tensor_or_with_a_wrong_one_is_named(checkpoint, tmp_path, change, fault):
    shutil.copytree(checkpoint, tmp_path / "hf")
    tensors, latent = hf_export.load_latent(checkpoint)
    head = {name: np.array(tensor) for name, tensor in tensors.items()}
    change(head)
    hf_export.save_latent(tmp_path / "hf", head, latent)
    (tmp_path / "hf" / "checksums.json").unlink()  # changed on purpose
    with pytest.raises(UserError, match=fault):
        loaded(setup(loaded_config(), dtypes=stored(checkpoint)), tmp_path / "hf")


def test_a_method_without_a_head_says_that_it_drops_one(checkpoint, capsys):
    ready = setup(small.config("sft", model={"init": "checkpoint"}), dtypes=stored(checkpoint), method=sft.METHOD)
    state = loaded(ready, checkpoint)
    assert not [path for path in {**state.trainable, **state.frozen} if path.startswith("head.")]
    assert capsys.readouterr().err == f"{checkpoint}: its latent head is dropped; method sft has none\n"


def test_weights_are_computed_in_the_chosen_dtype_but_statistics_and_scalars_in_fp32(made):
    made = jax.tree.map(jnp.asarray, made)
    model = setup(small.config(model={"compute_dtype": "bfloat16"})).build(made.trainable, made.frozen)
    assert model.vlm.text.embed[...].dtype == model.head.fc1[...].dtype == jnp.bfloat16
    assert model.head.mean[...].dtype == model.head.logit_scale[...].dtype == jnp.float32


@pytest.mark.parametrize(
    ("named", "problem"),
    [
        ("cudnn", "cudnn runs on NVIDIA GPUs, and the mesh is of platform cpu"),
        ("splash", "splash runs on TPUs, and the mesh is of platform cpu"),
    ],
)
def test_an_attention_kernel_that_cannot_run_on_the_mesh_is_an_error(named, problem):
    with pytest.raises(UserError, match=rf"config\.model\.attention: {problem}"):
        setup(small.config(model={"attention": named}))


def test_attention_is_chosen_for_the_platform_and_handed_to_the_step_alone(made):
    choose = lambda wanted: choose_attention(wanted, "tpu", jnp.bfloat16, small.model_config()).implementation
    assert choose("auto") == "splash" and choose("reference") == "reference"
    ready = setup(small.config())
    assert ready.attention == ("reference", "")
    trees = jax.tree.map(jnp.asarray, (made.trainable, made.frozen))
    beside, within = ready.build(*trees).vlm, ready.build(*trees, "splash").vlm
    assert beside.text.attention == beside.vision.attention == "reference"
    assert within.text.attention == within.vision.attention == "splash"


def test_tp_must_divide_the_models_heads():
    with pytest.raises(UserError, match=r"config\.mesh\.tp: 8 does not divide the model's 4 attention heads"):
        setup(small.config(), (1, 1, 8))


# ---------------------------------------------------------------- what a method says that learns


def only(*begins, but=()):
    """Fine-tuning of the paths that begin so."""
    return dataclasses.replace(pretrain.METHOD, learns=lambda path, config: path.startswith(begins) and path not in but)


def works(ready) -> tuple[str, str]:
    ledger = ready.ledger("cpu", 1)
    return ledger.text, ledger.vision


def test_the_head_alone_learns():
    ready = setup(small.config(), method=only("head."))
    assert {path.split(".")[0] for path in ready.trainable} == {"head"} and "head.mean" not in ready.trainable
    assert works(ready) == ("nothing", "nothing")
    state = ready.abstract()
    assert {path for path in state.frozen if path.startswith("vlm.text.")} and len(state.trainable) == len(
        ready.trainable
    )


def test_backbone_and_merger_learn_with_embeddings_frozen():
    ready = setup(small.config(), method=only("vlm.text.", "vlm.vision.merger.", but=("vlm.text.embed",)))
    assert "vlm.text.embed" not in ready.trainable and "vlm.text.blocks.q" in ready.trainable
    assert {path for path in ready.trainable if path.startswith("vlm.vision.")} == {
        path for path in ready.structure.variables if path.startswith("vlm.vision.merger.")
    }
    assert works(ready) == ("weights", "merger")
    tower = setup(small.config(), method=only("vlm.vision."))
    assert works(tower) == ("nothing", "weights")


def test_adapters_learn_in_place_of_the_matrices_that_a_method_names():
    adapted = small.config(model={"lora_rank": 2})
    ready = setup(adapted, method=only("head.", "vlm.text.blocks.q", "vlm.vision.merger."))
    text = {path for path in ready.trainable if path.startswith("vlm.text.")}
    assert text == {"vlm.text.blocks.lora.q_a", "vlm.text.blocks.lora.q_b"}
    assert works(ready) == ("adapters", "merger")


def test_adapters_that_nobody_would_train_are_refused():
    with pytest.raises(
        UserError, match=r"config\.model\.lora_rank: got 2, but method pretrain trains no matrix of the"
    ):
        setup(small.config(model={"lora_rank": 2}), method=only("head."))


def test_a_run_that_trains_nothing_is_refused():
    with pytest.raises(UserError, match="config.method: pretrain trains no weight with these settings"):
        setup(small.config(), method=only("none."))
