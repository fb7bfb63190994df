"""Adapters: the model as it was at step 0, only they learn, and merged they are the adapted model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import latent_jax
from latent_jax.config import schema
from latent_jax.errors import UserError
from latent_jax.methods import pretrain, sft
from latent_jax.models import hf_export, hf_io, lora
from latent_jax.models.parameters import Structure
from latent_jax.models.qwen2_5_vl.model import Qwen2_5_VL
from latent_jax.runtime import sharding
from latent_jax.runtime.checkpoints import Checkpoints
from latent_jax.training import finish, resume, workdir
from latent_jax.training.state import first_state, make_setup
from latent_jax.training.step import make_step
from tests.reference import ours, small

RANK, ALPHA = 3, 5.0
# Letters of every adapted weight of a layer: in, out.
MATRICES = {"q": "D NH", "k": "D KH", "v": "D KH", "o": "NH D", "gate": "D F", "up": "D F", "down": "F D"}
SIZES = dict(D=64, N=4, K=4, H=16, F=96)


def adapted_config(**sections):
    return small.config(model={"lora_rank": RANK, "lora_alpha": ALPHA}, **sections)


def setup(config, mesh=(1, 1, 1), dtypes=None):
    mesh = sharding.make_mesh(*mesh, jax.devices()[: np.prod(mesh)])
    return make_setup(config, pretrain.METHOD, small.model_config(), mesh, dtypes or {})


@functools.cache
def start():
    return jax.device_get(first_state(setup(adapted_config()), ""))


@functools.cache
def trained(mesh=(1, 1, 1)):
    """(losses, last state, on the host) of three steps."""
    config = adapted_config()
    ready = setup(config, mesh)
    state = jax.device_put(start(), jax.tree.map(lambda leaf: leaf.sharding, ready.abstract()))
    batches = [jax.device_put(b, sharding.batch_sharding(ready.mesh)) for b in small.batches(config, 3)]
    step = make_step(ready).lower(state, batches[0]).compile(compiler_options=ours.QUICK)
    losses = []
    for batch in batches:
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss/total"]))
    return losses, jax.device_get(state)


def adapters(arrays) -> dict:
    return {path: a for path, a in arrays.items() if ".lora." in path}


def merged_by_hand(arrays, dtype=np.float64) -> dict:
    """W + alpha / rank A B, matrix by matrix, in float64."""
    found = {path: np.asarray(a) for path, a in arrays.items() if ".lora." not in path}
    for name, letters in MATRICES.items():
        inside, outside = letters.split()
        a, b = (np.asarray(arrays[f"vlm.text.blocks.lora.{name}_{half}"], np.float64) for half in "ab")
        product = np.einsum(f"L{inside}r,Lr{outside}->L{inside}{outside}", a, b)
        path = f"vlm.text.blocks.{name}"
        found[path] = np.asarray(found[path], np.float64) + ALPHA / RANK * product
    return {path: a.astype(dtype) if a.dtype == np.float64 else a for path, a in found.items()}


def test_everything_else_starts_as_without_adapters():
    plain = jax.device_get(first_state(setup(small.config()), ""))
    plain, found = ({**state.trainable, **state.frozen} for state in (plain, start()))
    assert set(found) - set(plain) == set(adapters(found)) and len(adapters(found)) == 2 * len(MATRICES)
    for path, array in plain.items():
        np.testing.assert_array_equal(found[path], array, err_msg=path)
    for path, array in adapters(found).items():
        assert array.any() == path.endswith("_a"), path


@functools.partial(jax.jit, compiler_options=ours.QUICK)
def hidden(model, batch):
    x = model.vlm.embed(batch["tokens"], jnp.full_like(batch["tokens"], -1), None)
    return model.vlm.decode(x, batch)[0]


def final(config, arrays) -> np.ndarray:
    """Final hidden states of a batch's text by the model that a run of `config` builds from these arrays."""
    model = setup(config).build({path: jnp.asarray(np.asarray(a)) for path, a in arrays.items()}, {})
    return np.asarray(hidden(model, one_batch()))


@functools.cache
def one_batch() -> dict:
    return {key: jnp.asarray(value[0]) for key, value in small.batches(small.config(), 1)[0].items()}


def test_the_model_starts_as_its_base_bit_for_bit():
    arrays = {**start().trainable, **start().frozen}
    base = {path: a for path, a in arrays.items() if ".lora." not in path}
    np.testing.assert_array_equal(final(adapted_config(), arrays), final(small.config(), base))


def test_only_adapters_and_the_methods_head_are_trained_and_optimised():
    losses, state = trained()
    assert losses[-1] < losses[0]
    assert {path for path in state.trainable if not path.startswith("head.")} == set(adapters(state.trainable))
    assert set(state.opt_state[1].mu) == set(state.trainable)
    count = sum(a.size for a in adapters(state.trainable).values())
    width = lambda letters: int(np.prod([SIZES[letter] for letter in letters]))
    assert count == 2 * RANK * sum(width(part) for letters in MATRICES.values() for part in letters.split())
    for path, array in adapters(state.trainable).items():
        assert not np.array_equal(array, start().trainable[path]), f"{path} did not learn"
    for path, array in state.frozen.items():
        np.testing.assert_array_equal(array, start().frozen[path], err_msg=path)


def test_any_mesh_equals_one_device():
    (losses, state), (want_losses, want) = trained((1, 2, 2)), trained()
    np.testing.assert_allclose(losses, want_losses, rtol=1e-5)
    for path, array in want.trainable.items():
        # Three steps moved every weight by up to 2e-3: this is a two-thousandth of that.
        np.testing.assert_allclose(state.trainable[path], array, rtol=1e-5, atol=1e-6, err_msg=path)


def test_adapters_are_sharded_by_their_letters():
    ready = setup(adapted_config(), (1, 2, 2))
    spec = lambda name: tuple(ready.abstract_array(f"vlm.text.blocks.lora.{name}").sharding.spec)
    assert spec("q_a") == (None, "fsdp", None) and spec("q_b") == (None, None, "tp", None)
    assert spec("o_a") == (None, "tp", None, None) and spec("o_b") == (None, None, "fsdp")


def test_merged_is_the_adapted_model():
    _, state = trained()
    arrays = {**state.trainable, **state.frozen}
    by_hand = merged_by_hand(arrays)
    merged = lora.merge(arrays, RANK, ALPHA)
    assert merged.keys() == by_hand.keys()
    for path, want in by_hand.items():
        np.testing.assert_allclose(np.asarray(merged[path]), want, rtol=1e-6, atol=1e-7, err_msg=path)
        if isinstance(merged[path], lora.Merged):
            np.testing.assert_array_equal(merged[path][1:2], np.asarray(merged[path])[1:2])
            assert np.abs(want - arrays[path]).max() > 1e-3, f"{path}: too little was learned to tell"
    found, want = final(adapted_config(), arrays), final(small.config(), merged)
    np.testing.assert_allclose(found, want, atol=1e-5 * float(np.abs(want).max()))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A workdir of adapters on a bfloat16 checkpoint, exported at its end: (directory, state)."""
    directory = tmp_path_factory.mktemp("lora")
    base, source = merged_base(), directory / "base"
    hf_export.save(source, base, small.model_config(), source=small.directory(), dtype=jnp.bfloat16)
    config = adapted_config()
    ready = setup(config, (1, 2, 2), {f"vlm.{path}": np.dtype(jnp.bfloat16) for path in base})
    _, state = trained()
    half = lambda path, a: a.astype(jnp.bfloat16) if path.startswith("vlm.") else a
    state = state._replace(frozen={path: half(path, a) for path, a in state.frozen.items()})
    state = jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, ready.abstract()))
    schema.write(config, directory / workdir.CONFIG)
    hf_export.keep_origin(source, directory / workdir.ORIGIN)
    with Checkpoints(directory / workdir.CHECKPOINTS) as checkpoints:
        resume.save(checkpoints, state, {"position": 3}, {})
        checkpoints.wait()
        restored, *_ = resume.restore(checkpoints, ready, directory)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    finish.export(ready, restored, directory)
    return directory, jax.device_get(state)


def merged_base() -> dict:
    """The random base weights under the model's own paths."""
    arrays = {**start().trainable, **start().frozen}
    return {p.removeprefix("vlm."): a for p, a in arrays.items() if p.startswith("vlm.") and ".lora." not in p}


def test_the_export_is_the_merged_model_rounded_once(run):
    directory, state = run
    exported = hf_io.load(directory / "hf", small.model_config())
    for path, want in merged_by_hand({**state.trainable, **state.frozen}, np.float32).items():
        if path.startswith("vlm."):
            got = exported[path.removeprefix("vlm.")]
            assert got.dtype == jnp.bfloat16, path
            # Sums in float32 and float64 fall on two sides of a rounding boundary once in a while.
            np.testing.assert_allclose(np.asarray(got, np.float32), want, rtol=2**-8, atol=1e-6, err_msg=path)
            exact = np.asarray(got) == np.asarray(want, jnp.bfloat16)
            assert exact.mean() > 0.999, path


def test_a_workdir_loads_as_its_export_does(run):
    directory, _ = run
    messages = [{"role": "user", "content": "What color is the ball?"}]
    found, want = (latent_jax.load(at).logits(messages) for at in (directory, directory / "hf"))
    np.testing.assert_array_equal(found, want)


def test_what_does_not_go_together_is_an_error():
    with pytest.raises(UserError, match=r"config\.model\.lora_rank: got 3 with config\.model\.trainable=all; adapters"):
        small.config(model={"lora_rank": 3, "trainable": "all"})
    with pytest.raises(UserError, match=r"config\.model\.lora_alpha: got 0.0, expected a number > 0"):
        small.config(model={"lora_rank": 3, "lora_alpha": 0.0})
    with pytest.raises(UserError, match=r"config\.model\.lora_rank: got 64, expected less than 64, the width of the"):
        setup(small.config(model={"lora_rank": 64}))


def test_a_method_without_a_head_trains_adapters_alone():
    config = small.config("sft", model={"lora_rank": 2})
    mesh = sharding.make_mesh(1, 1, 1, jax.devices()[:1])
    ready = make_setup(config, sft.METHOD, small.model_config(), mesh, {})
    assert ready.trainable and all(".lora." in path for path in ready.trainable)


def test_a_model_without_adapters_has_no_part_of_them():
    structure = Structure.of(nnx.eval_shape(lambda: Qwen2_5_VL(small.model_config(), rngs=nnx.Rngs(0))))
    assert not [path for path in structure.variables if "lora" in path]
    assert lora.merge({"a": np.ones(2)}, 0, 1.0).keys() == {"a"}
