"""The training step as a TPU's own compiler lays it out: what moves, how much of it, and where."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from latent_jax import plan as command
from latent_jax.assets import TINY_VL
from latent_jax.config import schema
from latent_jax.data import typical
from latent_jax.data.chat import Processor
from latent_jax.data.layout import Layout, Room, Slots, Text
from latent_jax.data.packing import Packer, size_of
from latent_jax.errors import UserError
from latent_jax.main import parse
from latent_jax.methods import sft
from latent_jax.models.qwen2_5_vl import flops
from latent_jax.perf import planning, topologies
from latent_jax.training import resolve

ROOT = Path(__file__).resolve().parents[1]
EVALUATION = ROOT / "configs" / "evaluate.py"
# Wide enough that weights are much larger than whatever else moves, narrow enough to compile in seconds.
LAYERS, WIDTH, FORWARD, VOCABULARY = 4, 512, 2048, 20_480
LAYER = 2 * (2 * WIDTH * WIDTH + 2 * WIDTH * 256 + 3 * WIDTH * FORWARD)  # bytes of its matrices in bfloat16


# How a TPU's compiler refuses a step that is too large for it.
REFUSED = (
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 25.24G of 15.75G "
    "hbm. Exceeded hbm capacity by 9.49G.\n\nTotal hbm usage >= 25.49G:\n    reserved        258.00M"
)
# The same, where the temporaries alone are too many (libtpu 0.0.42.1, rows of 65,536 tokens on v5e:2x2).
REFUSED_EARLY = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (209.93G) exceeds "
    "available HBM (15.75G)."
)


@pytest.fixture(scope="module", autouse=True)
def environment():
    """As the command sets it, and put back for the tests that start processes of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"] + " --xla_gpu_autotune_level=0")
        for name in ("TPU_SKIP_MDS_QUERY", "TPU_ACCELERATOR_TYPE", "TPU_WORKER_HOSTNAMES", "TF_CPP_MIN_LOG_LEVEL"):
            patch.setenv(name, os.environ.get(name, ""))
            patch.delenv(name)
        topologies.prepare_environment()
        yield


@pytest.fixture(scope="module")
def shape(tmp_path_factory):
    """A checkpoint directory without weights: four layers, untied, twice as many queries as keys."""
    folder = tmp_path_factory.mktemp("shape")
    content = json.loads((TINY_VL / "config.json").read_text())
    content |= dict(hidden_size=WIDTH, intermediate_size=FORWARD, num_attention_heads=4, num_key_value_heads=2)
    content |= dict(num_hidden_layers=LAYERS, tie_word_embeddings=False, vocab_size=VOCABULARY)
    content |= dict(rope_scaling=dict(type="mrope", mrope_section=[16, 24, 24]))
    content["vision_config"] |= dict(hidden_size=256, num_heads=2, intermediate_size=512, out_hidden_size=WIDTH)
    (folder / "config.json").write_text(json.dumps(content))
    shutil.copy(TINY_VL / "preprocessor_config.json", folder)
    return folder


def config(directory, method="pretrain", **sections):
    made = schema.default(method)
    made.model.update(path=str(directory), init="random", compute_dtype="bfloat16")
    made.data.update(max_pixels=112 * 112, row_tokens=512)
    made.train.update(batch_size=64)
    for name, values in sections.items():
        made[name].update(values)
    return schema.resolve(made)


def published(*overrides: str, file: str = "pretrain", variant: str = "qwen2_5_vl_7b"):
    return parse([f"--config={ROOT / 'configs' / file}.py:{variant}", *(f"--config.{each}" for each in overrides)])[0]


def needs(name: str):
    missing = topologies.plugin(name)
    return pytest.mark.skipif(missing is not None, reason=f"the compiler for {name} is not installed: {missing}")


# ---------------------------------------------------------------- the compiled program


@pytest.fixture(scope="module")
def found(shape):
    """Latent pretraining on eight v5e chips, as their compiler lays it out."""
    return planning.plan(config(shape), topologies.parse("v5e:2x4"))


def check_layers(found, layers: int, layer: int):
    """No all-gather or all-reduce larger than a layer's matrices (bytes) inside the loop over layers; gradients are
    reduce-scattered, or passed round in parts while they are computed."""
    looped = [each for each in found.compiled.collectives if each.loops]
    assert max(each.bytes for each in looped) <= layer
    # Every matrix is gathered forward and again for the backward pass.
    gathered = sum(each.bytes * each.times for each in looped if each.kind == "all-gather")
    assert 2 * layers * layer <= gathered < 2.2 * layers * layer
    summed = sum(each.bytes for each in looped if each.kind == "all-reduce")
    assert summed < 0.01 * layer, [each for each in looped if each.kind == "all-reduce"]
    moved = sum(each.bytes * each.times for each in looped if each.kind in ("reduce-scatter", "collective-permute"))
    assert moved >= 0.8 * layers * layer


def check_table(found, table: int):
    """The vocabulary's matrix (elements) moves twice, gathered and its gradient summed, and in no loop."""
    large = [each for each in found.compiled.collectives if each.bytes >= 2 * table]
    assert len(large) == 2 and {each.loops for each in large} == {0}, large


@needs("v5e:2x4")
def test_weights_are_gathered_and_gradients_scattered_layer_by_layer(found):
    check_layers(found, LAYERS, LAYER)


@needs("v5e:2x4")
def test_the_vocabulary_s_matrix_moves_once_and_outside_the_chunks(found):
    check_table(found, VOCABULARY * WIDTH)


@needs("v5e:2x4")
def test_the_state_is_donated_and_the_bytes_add_up(found):
    state = sum(found.arguments[name] for name in ("parameters", "optimiser", "frozen"))
    assert state <= found.compiled.donated < 1.1 * state
    assert found.fits and found.arguments["optimiser"] == pytest.approx(2 * found.arguments["parameters"], rel=0.01)
    assert sum(found.arguments.values()) < found.peak


@needs("v5e:2x4")
def test_compiled_flops_are_four_forward_passes_and_what_is_masked(found):
    """Full rematerialisation: forward, forward again, backward; the table's three passes are not repeated."""
    text, vision = (each / found.topology.devices for each in found.model_flops)
    assert text * 4 / 3 * 0.8 < found.compiled.flops < (text * 4 / 3 + vision) * 1.5


@needs("v5e:2x4")
def test_the_report_ends_with_the_verdict(found, monkeypatch, capsys):
    monkeypatch.setattr(planning, "plan", lambda config, topology: found)
    assert command.main([f"--config={ROOT / 'configs/pretrain.py'}:qwen2_5_vl_7b", "--topology=v5e:2x4"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == "verdict: fits"
    for word in ("parameters", "optimiser", "frozen", "batch", "temporaries", "peak", "all-gather", "MFU"):
        assert any(word in line for line in printed), word


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v5p:2x2x2", "a100-40gb:8"])
def test_7b_pretraining_is_laid_out_as_it_should_be(name):
    if missing := topologies.plugin(name):
        pytest.skip(f"the compiler for {name} is not installed: {missing}")
    found = planning.plan(published(), topologies.parse(name))
    assert found.fits
    check_layers(found, 28, 2 * (2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944))
    check_table(found, 152_064 * 3584)


@pytest.mark.slow
@needs("a100-40gb:8")
def test_full_fine_tuning_of_7b_in_rows_of_4k_fits_eight_a100_40gb():
    asked = published("data.rows=1", "data.tokens=4096", file="finetune")
    assert planning.plan(asked, topologies.parse("a100-40gb:8")).fits


# ---------------------------------------------------------------- what is compiled


def test_the_frozen_encoder_is_bfloat16_and_has_no_optimiser_state():
    setup, _ = planning.prepare(published(), jax.devices()[:8])
    state = setup.abstract()
    encoder = {path: leaf for path, leaf in state.frozen.items() if path.startswith("vlm.vision.")}
    assert encoder and {leaf.dtype for leaf in encoder.values()} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in state.trainable.values()} == {jnp.dtype(jnp.float32)}
    adam = next(
        part for part in jax.tree.leaves(state.opt_state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(part, "mu")
    )
    assert adam.mu.keys() == adam.nu.keys() == state.trainable.keys()


def test_the_batch_is_the_one_that_training_would_choose_for_such_examples():
    setup, batches = planning.prepare(published(), jax.devices()[:8])
    batch_shape, work = batches.batch_shape, batches.work
    assert (batch_shape.groups, batch_shape.examples, batch_shape.slots, batch_shape.image_patches) == (8, 32, 144, 576)
    # 32 examples of 144 slots and 64 words, in rows of at most 4096 tokens.
    assert batch_shape.rows * batch_shape.tokens == pytest.approx(32 * 208, rel=0.1) and batch_shape.tokens <= 4096
    assert batch_shape.patches == pytest.approx(32 * 576, rel=0.1)
    assert work.tokens == 8 * batch_shape.rows * batch_shape.tokens
    assert planning.abstract_batch(batch_shape, setup)["patches"].shape[:2] == (1, 8)


def test_sizes_that_the_config_names_are_kept():
    asked = published("data.rows=3", "data.tokens=640", "data.patches=1024", "train.accumulate=2", file="finetune")
    batch_shape = planning.prepare(asked, jax.devices()[:8])[1].batch_shape
    assert (batch_shape.micro, batch_shape.rows, batch_shape.tokens, batch_shape.patches) == (2, 3, 640, 1024)
    assert batch_shape.examples == 128 // 16


def test_a_model_that_is_not_here_is_named():
    asked = published("model.preset=")
    with pytest.raises(UserError, match="config.model.path: 'Qwen/Qwen2.5-VL-7B-Instruct' is not on this machine"):
        planning.prepare(asked, jax.devices()[:8])


# ---------------------------------------------------------------- a method's typical record

VIEWS, CROPS, WORDS = 3, 2, 100


def views_of(record, index, config, processor):
    """Three questions about an image and its two crops, each with slots before its answer."""
    content = [{"type": "image", "image": image} for image in record["images"]]
    shown = [
        [
            {"role": "user", "content": [*content, {"type": "text", "text": q["question"]}, {"type": "imagine"}]},
            {"role": "assistant", "content": q["answer"]},
        ]
        for q in record["questions"]
    ]
    found = processor.render_conversations(shown, imagined_grid=4, key=record["key"])
    learned = [
        tuple(dataclasses.replace(p, source="learned") if isinstance(p, Slots) else p for p in v) for v in found.views
    ]
    return dataclasses.replace(found, views=tuple(learned))


def typical_record(config):
    images = [typical.image(280, 280), *(typical.image(112, 112, number) for number in range(CROPS))]
    questions = [
        {"question": f"{number} {typical.words(WORDS)}", "answer": typical.words(number + 1)} for number in range(VIEWS)
    ]
    return {"key": "typical", "images": images, "captions": [], "questions": questions}


TYPICAL = dataclasses.replace(
    sft.METHOD, layout=views_of, room=lambda config: Room(slots=4 * VIEWS), typical=typical_record
)


@pytest.fixture
def typical_method(monkeypatch):
    monkeypatch.setattr(planning.methods, "find", lambda name: TYPICAL)


def typical_config(**data):
    return config(TINY_VL, "sft", data=dict(row_tokens=2048, **data), train=dict(batch_size=32))


def packed(batch_shape, example):
    """The fullest batch of such examples, by the packer that training uses."""
    packer, number = Packer(batch_shape), 0
    while (full := packer.add(example, number=number)) is None:
        number += 1
    return full


def test_a_typical_record_is_laid_out_by_the_method_and_fills_the_batch(typical_method):
    _, batches = planning.prepare(typical_config(max_pixels=280 * 280), jax.devices()[:4])
    processor = Processor.from_directory(TINY_VL, None, 280 * 280)
    example = processor.lay_out(views_of(typical_record(None), 0, None, processor))  # with its pixels
    size = size_of(example)
    assert (size.patches, size.slots, example.view_ids.max()) == (400 + CROPS * 64, 4 * VIEWS, VIEWS)
    batch = packed(batches.batch_shape, example)
    assert 400 <= batches.batch_shape.image_patches < 464 and batch["example_mask"].sum() > 1
    assert batches.work == flops.count(batch)
    assert batches.work.supervised == batch["example_mask"].sum() * int((example.loss_weights > 0).sum())
    assert f"{size.tokens} tokens" in batches.example and "3 view(s), 3 image(s) of 528 patches" in batches.example
    assert "embedded tokenizer" not in batches.example


def test_sizes_that_the_config_names_are_kept_with_a_typical_record_too(typical_method):
    _, batches = planning.prepare(
        typical_config(max_pixels=280 * 280, rows=2, tokens=1536, patches=2048), jax.devices()[:4]
    )
    assert (batches.batch_shape.rows, batches.batch_shape.tokens, batches.batch_shape.patches) == (2, 1536, 2048)
    with pytest.raises(UserError, match=r"config\.data\.tokens: got 64, expected at least \d+, what the smallest"):
        planning.prepare(typical_config(tokens=64), jax.devices()[:4])


def test_words_are_counted_without_the_targets_tokenizer(shape, typical_method):
    asked = config(shape, "sft", data=dict(row_tokens=2048), train=dict(batch_size=32))
    _, batches = planning.prepare(asked, jax.devices()[:4])
    assert batches.example.endswith("; words counted by the embedded tokenizer")
    assert batches.work.tokens > 3 * WORDS


def test_a_method_that_names_no_record_is_planned_by_the_rule(monkeypatch):
    silent = dataclasses.replace(TYPICAL, typical=lambda config: None)
    monkeypatch.setattr(planning.methods, "find", lambda name: silent)
    _, batches = planning.prepare(typical_config(max_pixels=112 * 112), jax.devices()[:4])
    assert batches.example == "as for examples of one image of at most 64 patches and 64 text tokens"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"typical": lambda config: {"key": "few"}}, "Method.typical of sft: record 'few': KeyError: 'images'"),
        (
            {"typical": lambda config: typical_record(config) | {"images": [b"none"]}},
            "Method.typical of sft: record 'typical'",
        ),
        (
            {"layout": lambda *_: Layout(trunk=(Text("all is prompt"),))},
            "the layout of sft leaves nothing to be scored in any of 1 sampled examples",
        ),
        ({"room": lambda config: Room(slots=1)}, "Method.room of sft has slots=1, but every sampled example needs at"),
    ],
)
def test_a_typical_record_that_cannot_be_laid_out_is_one_line(changed, message, monkeypatch):
    monkeypatch.setattr(planning.methods, "find", lambda name: dataclasses.replace(TYPICAL, **changed))
    with pytest.raises(UserError, match=rf"^config\.method: {message}"):
        planning.prepare(typical_config(), jax.devices()[:4])


def test_remat_is_resolved_by_the_planned_devices(shape):
    """By training's rule, which asks the mesh and not the machine that plans."""
    asked = config(shape)
    setup, batches = planning.prepare(asked, jax.devices()[:8])
    assert setup.config.model.remat == "none"
    assert resolve.resolved(asked, batches.batch_shape, "tpu").model.remat == "full"


# ---------------------------------------------------------------- what does not fit


def test_the_compiler_s_refusal_is_an_answer():
    v5e = topologies.parse("v5e:4x4")
    line, temporaries, there = planning.out_of_memory(REFUSED, v5e, arguments=2**30)
    assert (temporaries, there) == (int(25.24 * 2**30) - 2**30, int(15.75 * 2**30)) and "\n" not in line
    assert planning.out_of_memory(REFUSED_EARLY, v5e, arguments=2**30)[1:] == (int(209.93 * 2**30), int(15.75 * 2**30))
    assert planning.out_of_memory("RESOURCE_EXHAUSTED: no numbers", v5e, arguments=1)[1:] == (None, v5e.memory)


def test_any_other_failure_is_one_line():
    with pytest.raises(UserError, match="v5e:4x4: the compiler failed: INTERNAL: something$"):
        planning.out_of_memory("INTERNAL: something\nand a trace", topologies.parse("v5e:4x4"), 0)


def failed(asked, arguments: int, temporaries: int):
    setup, batches = planning.prepare(asked, jax.devices()[:8])
    return planning.Plan(
        config=asked, topology=topologies.parse("a100-40gb:8"), mesh=dict(replica=1, fsdp=8, tp=1),
        remat="full", batches=batches, attention=setup.attention, arguments={"parameters": arguments},
        model_flops=(0.0, 0.0),
        temporaries=temporaries, peak=arguments + temporaries, memory=40, refused="", compiled=None,
    )  # fmt: skip


def test_changes_go_from_the_cheapest_to_the_dearest():
    asked = published("model.remat=dots", file="finetune")
    words = [words for words, _, _ in planning.alternatives(failed(asked, 10, 100))]
    assert words[:2] == ["--config.model.remat=full", "--config.train.accumulate=4"]  # 100 into 30 takes four
    assert words[-1].startswith("--topology=a100-40gb:")
    change, larger = list(planning.alternatives(failed(asked, 10, 100)))[1][1:]
    assert change == dataclasses.replace(asked, train=dataclasses.replace(asked.train, accumulate=4))
    assert larger.name == "a100-40gb:8"


def test_rows_of_a_named_length_are_shortened_not_divided():
    asked = published("data.rows=1", "data.tokens=4096", file="finetune")
    words = [words for words, _, _ in planning.alternatives(failed(asked, 10, 100))]
    assert words[0] == "--config.data.rows=1 --config.data.tokens=2048"
    assert not any("accumulate" in each for each in words)


def test_where_the_state_alone_is_too_large_only_more_devices_help():
    words = [words for words, _, _ in planning.alternatives(failed(published(), 100, 10))]
    assert words[0] == "--topology=a100-40gb:8x8" and all(each.startswith("--topology") for each in words)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology=a100:8"], "error: --topology=a100:8: expected one of"),
        (["--topology=v5e:4x4", "--config=nowhere.py"], "error: --config=nowhere.py: no such file"),
        (["--topology=v5e:4x4", "--what=1"], "error: --what"),
        (["--topology=v5e:4x4", f"--config={EVALUATION}"], "error: config.job: got 'evaluate', expected 'train'"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(topologies, "start", lambda: None)
    with pytest.raises(SystemExit) as ended:
        command.main(arguments)
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(message) and printed.err.count("\n") == 1 and not printed.out
