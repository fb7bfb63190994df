"""What every method must keep, over all of the package and one of one's own that stands in this file.

`Toy` has nothing of pretraining: a head of other parameters, no section `latent`, noise of its own in the loss, a
number of latents instead of a grid, and an answer given over them.
"""

import dataclasses
import functools
import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import latent_jax
from latent_jax import convert, evaluate, methods, train
from latent_jax.config import schema
from latent_jax.config.fields import option
from latent_jax.data.builders.build import build_scenes
from latent_jax.data.layout import Room, with_learned_slots
from latent_jax.data.messages import imagine_parts
from latent_jax.data.packing import BatchShape, Packer
from latent_jax.errors import UserError
from latent_jax.methods import sft
from latent_jax.methods.contract import Method, Span, Think
from latent_jax.methods.imagine import replace
from latent_jax.models import hf_export
from latent_jax.models.heads import LatentVLM
from latent_jax.models.parameters import Declare, Structure
from latent_jax.runtime.checkpoints import Checkpoints
from latent_jax.training import latent_config
from latent_jax.training.state import new_model
from tests.reference import benchmark_records, small
from tests.reference.ours import QUICK

NAME = "tests.methods.test_contract"
EVERY = [*methods.names(), NAME]


# ---------------------------------------------------------------- a method of one's own


@dataclasses.dataclass(frozen=True)
class Toy:
    count: int = option(3, "latents of a question", low=1)
    noise: float = option(0.1, "standard deviation of what is added to a latent while training", low=0.0)


@dataclasses.dataclass(frozen=True)
class ToyConfig(sft.SftConfig):
    toy: Toy = Toy()


class Head(nnx.Module):
    def __init__(self, count: int, hidden: int, rngs: nnx.Rngs):
        declare = Declare(dict(S=count, D=hidden), rngs, jnp.float32)
        self.basis = declare.normal("S D", "D", decay=False)
        self.mix = declare.normal("D 2 D", "D")
        self.unused = declare.constant("D")  # an export goes without it


def layout(record, index, config, processor):
    shown = sft.conversations(record, index, config, imagine=True)
    return with_learned_slots(processor.render_conversations(shown, imagined_grid=config.toy.count, key=record["key"]))


def predicted(model: LatentVLM, batch, config, questions: int, options):
    """(input embeddings (G, B, T, D), latents (G, E, S, D))"""
    merged, _, _ = model.vlm.encode(batch, image_patches=config.data.image_patches, **options)
    basis = jnp.tile(model.head.basis[...], (questions, 1)).astype(merged.dtype)
    features = jnp.concatenate([merged, jnp.broadcast_to(basis, (len(merged), *basis.shape))], axis=1)
    x = model.vlm.embed(batch["tokens"], batch["feature_index"], features)
    hidden, _ = model.vlm.decode(x, batch, **options)
    flat = hidden.reshape(len(hidden), -1, hidden.shape[-1])
    at = jax.vmap(lambda h, i: h[i])(flat, batch["slot_index"])
    return x, jnp.einsum("...D,DKE->...KE", at, model.head.mix[...]).sum(-2)


def loss(model: LatentVLM, batch, config):
    options = dict(remat=config.model.remat, unroll=config.model.unroll)
    x, latents = predicted(model, batch, config, config.chat.questions, options)
    fold = jax.vmap(jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(config.seed))))
    noise = jax.vmap(jax.vmap(lambda key: jax.random.normal(key, latents.shape[2:])))(fold(batch["number"]))
    x = replace(x, latents + config.toy.noise * noise, batch["slot_index"], batch["slot_mask"])
    return sft.scored(model, x, batch, options)


def thought_over(messages, config, processor, variant):
    assert variant in ("own", "doubled")
    shown = processor.render(messages, add_generation_prompt=True, imagined_grid=config.toy.count)
    return [with_learned_slots(shown) for _ in imagine_parts(messages)]


def think(model, batch, config, keys, temperature):
    _, latents = predicted(model, batch, config, 1, {})
    noise = jax.vmap(lambda key: jax.random.normal(key, latents.shape[2:]))(keys)
    latents = latents[0] + temperature * config.toy.noise * noise
    return latents.astype(jnp.float32), latents


def write(model, hidden, carry, i, config):
    """What is fed inside an answer: the mixed hidden state, and how much of it the prompt's length asks for."""
    latents = jnp.einsum("RD,DKE->RKE", hidden, model.head.mix[...]).sum(-2) * carry
    return latents, latents, carry * 0.9


def lengths(model, batch, merged, config):
    owners, R = batch["segment_ids"].reshape(-1), batch["number"].shape[1]
    return (jnp.zeros(R + 1).at[owners].add(1.0)[1:] / 100)[:, None]


METHOD = Method(
    config=ToyConfig,
    layout=layout,
    coefficients=sft.coefficients,
    weights=sft.weights,
    loss=loss,
    room=lambda config: Room(slots=config.toy.count * config.chat.questions),
    build_head=lambda model_config, config, rngs: Head(config.toy.count, model_config.text.hidden_size, rngs),
    learns=lambda path, config: path.startswith(("head.", "vlm.text.")) and path != "vlm.text.embed",
    exported=lambda path: path != "unused",
    passes=lambda config: 2,
    think=Think(lambda config: config.toy.count, thought_over, think, variants=("own", "doubled"), answers=True),
    span=Span(
        most=lambda config: config.toy.count,
        shape=lambda example, config: config.toy.count,
        feed=write,
        start=lengths,
        rule=lambda tokens, count, config: jnp.full(len(tokens), count == 1),
    ),
)


# ---------------------------------------------------------------- what every method keeps


def config_of(name: str, **sections):
    own = {"latent": dict(grid=2)} if name == "imagine" else {}
    own |= {"chat": dict(questions=2)} if "chat" in methods.find(name).sections else {}
    return small.config(name, **{**own, **sections})


@functools.cache
def model_of(name: str) -> LatentVLM:
    config, method = config_of(name), methods.find(name)
    make = lambda: new_model(config, method, small.model_config())  # noqa: E731
    structure = Structure.of(nnx.eval_shape(make))
    return structure.build(jax.jit(lambda: structure.arrays(make()))())


def batch_of(name: str, numbers: list[int], rows: int):
    config, method = config_of(name), methods.find(name)
    size = dict(rows=rows, tokens=224, patches=96, examples=4, slots=0, channels=588, image_patches=32)
    packer = Packer(BatchShape(micro=1, groups=1, **size).with_room(method.room(config)))
    for number in numbers:
        example = small.processor().lay_out(method.layout(small.record(number), number, config, small.processor()))
        assert packer.add(example, number=number) is None
    return {key: jnp.asarray(value[0]) for key, value in packer.flush().items()}


@functools.cache
def terms_of(name: str):
    config, method = config_of(name), methods.find(name)
    return jax.jit(lambda model, batch: method.loss(model, batch, config), compiler_options=QUICK)


@pytest.mark.parametrize("name", EVERY)
def test_terms_coefficients_and_weights_speak_of_the_same(name):
    config, method, batch = config_of(name), methods.find(name), batch_of(name, [0, 1, 2], 2)
    terms, metrics = terms_of(name)(model_of(name), batch)
    weights = method.weights(batch, config)
    assert terms.keys() == weights.keys() == method.coefficients(config, jnp.float32(0.3)).keys()
    assert all(float(terms[term][1]) == float(weights[term]) for term in terms)
    assert all(np.isfinite(float(part)) for pair in [*terms.values(), *metrics.values()] for part in pair)


@pytest.mark.parametrize("name", EVERY)
def test_packed_equals_the_examples_one_by_one(name):
    """Their noise too: it is of the example's number, wherever it stands."""
    together, _ = terms_of(name)(model_of(name), batch_of(name, [0, 1, 2], 2))
    alone = [terms_of(name)(model_of(name), batch_of(name, [number], 1))[0] for number in (0, 1, 2)]
    for term, (total, weight) in together.items():
        if term == "alignment":  # a loss over the batch
            continue
        np.testing.assert_allclose(total, sum(float(each[term][0]) for each in alone), rtol=3e-4)
        assert float(weight) == sum(float(each[term][1]) for each in alone)


@pytest.mark.parametrize("name", EVERY)
def test_a_layout_is_a_function_of_its_arguments(name):
    config, method, processor = config_of(name), methods.find(name), small.processor()
    first, second = (method.layout(small.record(1), 5, config, processor) for _ in range(2))
    assert first == second


def test_noise_depends_on_the_number_alone():
    batch = batch_of(NAME, [0, 1], 1)
    other = {**batch, "number": batch["number"].at[0, 0].set(9)}
    first, second = (float(terms_of(NAME)(model_of(NAME), each)[0]["next_token"][0]) for each in (batch, other))
    assert first != second


# ---------------------------------------------------------------- the toy's whole life


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    directory = tmp_path_factory.mktemp("contract") / "prepared"
    build_scenes(directory, sizes={"train": 40, "validation": 8})
    return directory


def run_config(scenes, steps=2):
    return config_of(
        NAME,
        data=dict(name="scenes_questions", path=str(scenes), image_patches=0, sample=16),
        mesh=dict(replica=2, fsdp=4),
        train=dict(steps=steps, schedule="constant", batch_size=8, warmup=0.0),
        checkpoint=dict(every=1, keep=0),
    )


@pytest.fixture(scope="module")
def made(scenes, tmp_path_factory):
    directory = tmp_path_factory.mktemp("contract") / "run"
    train.run(run_config(scenes), directory)
    return directory


def arrays(directory, step=2):
    with Checkpoints(directory / "checkpoints", read_only=True) as checkpoints:
        return {**checkpoints.restore_item(step, "trainable"), **checkpoints.restore_item(step, "frozen")}


def test_what_learns_is_what_the_method_says(made):
    before = {**jax.device_get(Structure.of(model_of(NAME)).arrays(model_of(NAME)))}
    after = arrays(made)
    changed = {path for path in after if path in before and not np.array_equal(before[path], after[path])}
    assert "vlm.text.embed" not in changed and not any(path.startswith("vlm.vision.") for path in changed)
    assert {"head.basis", "head.mix", "vlm.text.blocks.q"} <= changed


def question(text="What color is it?"):
    content = [{"type": "image", "image": small.record(0)["images"][0]}, {"type": "text", "text": text}]
    return [{"role": "user", "content": [*content, {"type": "imagine"}]}]


def test_it_loads_from_its_workdir_and_from_its_export_alike(made, tmp_path):
    convert.main([f"--checkpoint={made}", f"--output={tmp_path / 'hf'}", "--step=2"])
    loaded = [latent_jax.load(path) for path in (made, made / "hf", tmp_path / "hf")]
    found = [vlm.generate_ids([question()], 4) for vlm in loaded]
    assert found[0] == found[1] == found[2]
    tensors, settings = hf_export.load_latent(made / "hf")
    assert tensors.keys() == {"basis", "mix"} and settings["method"] == NAME and settings["toy"]["count"] == 3
    for vlm in loaded:
        ((own,),) = vlm.think([question()])
        assert own.latents.shape == own.inputs.shape == (3, 64)
        ((other,),) = vlm.think([question()], temperature=1.0, seed=1)
        again = vlm.think([question(), question("Is it?")], temperature=1.0, seed=1)[0][0]
        assert np.abs(own.latents - other.latents).max() > 1e-3
        np.testing.assert_allclose(other.latents, again.latents, atol=1e-5)


def test_it_writes_latents_inside_its_answers(made):
    """As its rule says, in a batch as alone; and a given answer with the same latents is as likely word by word."""
    for vlm in (latent_jax.load(made), latent_jax.load(made / "hf")):
        asked = [question(), question("Is there a red ball left of the cube?")]
        together = vlm.reply(asked, 8, keep=True)
        for conversation, reply in zip(asked, together, strict=True):
            alone = vlm.reply([conversation], 8, keep=True)[0]
            assert alone.ids == reply.ids and reply.opened == reply.closed == 1
            (own,) = reply.spans
            np.testing.assert_allclose(own.inputs, alone.spans[0].inputs, atol=1e-5)
            marks = vlm.config.vision_start_token_id, vlm.config.vision_end_token_id
            assert [reply.ids.index(mark) for mark in marks] == [1, 5]
        swapped = vlm.reply(asked, 8, spans=[[together[1].spans[0].inputs], ()])
        assert swapped[0].opened == 1 and swapped[1].opened == 0


def test_an_evaluation_asks_for_its_latents_and_intervenes(made, tmp_path, monkeypatch, capsys):
    records = benchmark_records.gqa(images=2, each=2)
    monkeypatch.setattr(evaluate.sources, "split_names", lambda name, path: ["testdev"])
    monkeypatch.setattr(evaluate.sources, "open_source", lambda name, path, split: records)
    monkeypatch.setattr(evaluate.sources, "fingerprint", lambda name, path, split: "records")
    config = schema.default_evaluation()
    config.data.path, config.log.progress, config.model.path = "there", False, str(made / "hf")
    config.evaluate.update(interventions=True, max_new_tokens=3)
    found = evaluate.run(schema.resolve(config), tmp_path / "own")
    assert found["imagine"] is True and (tmp_path / "own" / "interventions.json").exists()
    assert found["spans"] == {"replies": 4, "opened": 4, "never_opened": 0.0, "never_closed": 0.0}
    latents = json.loads((tmp_path / "own" / "interventions.json").read_text())["latents"]
    assert latents["count"] == 4 and latents["never_opened"] == latents["never_closed"] == 0
    shut = json.loads((tmp_path / "own" / "latents_none" / "results.json").read_text())
    assert shut["spans"]["never_opened"] == 1.0
    assert {p.name for p in (tmp_path / "own").iterdir()} >= {"latents_zero", "latents_permuted", "latents_none"}


def test_a_head_of_another_method_is_not_taken_for_ones_own(made, scenes, tmp_path, capsys):
    config = config_of(
        "pretrain",
        model=dict(path=str(made / "hf"), init="checkpoint"),
        data=dict(path=str(scenes), image_patches=0, sample=16),
        mesh=dict(replica=2, fsdp=4),
        train=dict(steps=1, batch_size=8),
        evaluate=dict(split="test"),
    )
    train.run(config, tmp_path / "run")
    assert f"its head is of method {NAME}; that of pretrain starts anew" in capsys.readouterr().err


def test_a_run_of_another_process_is_killed_and_resumes_to_the_bit(made, scenes, tmp_path):
    """Another process finds the method by its name alone, and a SIGKILL behind its first checkpoint loses nothing."""
    code = (
        "import os, signal, sys; sys.path.insert(0, os.getcwd()); sys.argv = ['main.py']\n"
        "from pathlib import Path\n"
        "from latent_jax import train\n"
        "from latent_jax.training import loop\n"
        "from tests.methods import test_contract as own\n"
        "from tests.reference import small\n"
        "def killed(checkpoints, *rest):\n"
        "    save(checkpoints, *rest); checkpoints.wait(); os.kill(os.getpid(), signal.SIGKILL)\n"
        "save, loop.save = loop.save, killed\n"
        "model, scenes, directory = (Path(line.strip()) for line in sys.stdin)\n"
        "small.directory = lambda: model\n"
        "train.run(own.run_config(scenes), directory)\n"
    )
    root, directory = Path(__file__).resolve().parents[2], tmp_path / "run"
    ended = subprocess.run(
        [sys.executable, "-c", code], input=f"{small.directory()}\n{scenes}\n{directory}\n", cwd=root, text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, timeout=600,
    )  # fmt: skip
    assert ended.returncode == -signal.SIGKILL, ended.stderr[-2000:]
    assert [path.name for path in (directory / "checkpoints").iterdir() if path.name.isdecimal()] == ["1"]
    train.run(run_config(scenes), directory)
    for path, array in arrays(made).items():
        np.testing.assert_array_equal(arrays(directory)[path], array, err_msg=path)
    lines = [(where / "metrics.jsonl").read_text().splitlines() for where in (directory, made)]
    losses = [[json.loads(line)["loss/total"] for line in each] for each in lines]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("name", ["nothing_of_this_name", "tests.methods", "os.path", "a b", "../x", ""])
def test_a_name_that_is_no_method_is_told(name):
    with pytest.raises(UserError, match=r"config\.method: got .*, expected one of imagine, pretrain, sft, or a module"):
        schema.default(name)


def test_old_exports_are_of_pretraining():
    found = latent_config.settings({"grid": 2, "space": "merged"}, "file")
    assert found.method == "pretrain" and found.latent.grid == 2
    for bad, message in (
        ({"method": "pretrain", "grid": 2}, "grid"),
        ({"method": "none"}, "method"),
        ({"gird": 2}, "gird"),
    ):
        with pytest.raises(UserError, match=rf"^file: .*{message}"):
            latent_config.settings(bad, "file")


@pytest.mark.slow
def test_plan_compiles_it_for_a_tpu(scenes):
    importlib.import_module("libtpu")
    from latent_jax.perf import planning, topologies

    topologies.prepare_environment()
    found = planning.plan(run_config(scenes), topologies.parse("v5e:2x4"))  # as many chips as its mesh has
    assert found.fits and found.compiled.flops > 0
