"""The convert command: round trips of HF directories, exports of workdirs, and bad input."""

import subprocess
import sys

import jax.numpy as jnp
import pytest
import torch

from latent_jax import config as schema
from latent_jax import convert
from latent_jax.errors import UserError
from latent_jax.models import hf_export, hf_io
from latent_jax.models.qwen2_5_vl import hf_names
from latent_jax.runtime.checkpoints import Checkpoints
from latent_jax.workdir import CHECKPOINTS, CONFIG, ORIGIN, Run
from tests.models import tiny_hf


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tiny_hf.write(tmp_path_factory.mktemp("made") / "hf", dtype=torch.bfloat16, sharded=True, new_names=True)


def run(*flags):
    convert.main([*map(str, flags)])


def test_an_hf_directory_makes_a_bit_equal_round_trip(made, tmp_path):
    run(f"--checkpoint={made}", f"--output={tmp_path / 'out'}")
    expected = {hf_names.normalise(name): tensor for name, tensor in tiny_hf.read(made).items()}
    assert tiny_hf.same_bits(tiny_hf.read(tmp_path / "out"), expected)


def test_the_dtype_is_what_was_told(made, tmp_path):
    run(f"--checkpoint={made}", f"--output={tmp_path / 'out'}", "--dtype=float16")
    expected = {hf_names.normalise(name): tensor.half() for name, tensor in tiny_hf.read(made).items()}
    assert tiny_hf.same_bits(tiny_hf.read(tmp_path / "out"), expected)


@pytest.mark.parametrize("kind", ["workdir", "step", "step with a slash"])
def test_a_workdir_and_its_steps_are_told_from_hf_directories(tmp_path, kind, monkeypatch):
    (tmp_path / "run" / "checkpoints" / "20").mkdir(parents=True)
    calls = []
    monkeypatch.setattr(convert, "export_workdir", lambda *arguments: calls.append(arguments))
    path, step = {
        "workdir": (tmp_path / "run", None),
        "step": (tmp_path / "run" / "checkpoints" / "20", 20),
        "step with a slash": (f"{tmp_path}/run/checkpoints/20/", 20),
    }[kind]
    run(f"--checkpoint={path}", f"--output={tmp_path / 'out'}", "--dtype=float32")
    assert calls == [(tmp_path / "run", tmp_path / "out", step, "float32")]


BAD = [
    (("--checkpoint=%/nowhere", "--output=%/out"), "nowhere: no such directory; expected a checkpoint directory"),
    (("--checkpoint=%/empty", "--output=%/out"), "empty: not a checkpoint directory; expected model.safetensors"),
    (("--checkpoint=%/empty", "--output=%/out", "--step=3"), "--step=3: "),
    (("--checkpoint=%/run/checkpoints/20", "--output=%/out", "--step=30"), "already names a step"),
    (("--checkpoint=%/empty", "--output=%/run"), "run: holds 'checkpoints', which no export writes"),
]


@pytest.mark.parametrize(("flags", "message"), BAD)
def test_bad_input_is_one_line_and_status_2(tmp_path, capsys, flags, message):
    (tmp_path / "run" / "checkpoints" / "20").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as caught:
        run(*(flag.replace("%", str(tmp_path)) for flag in flags))
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "out").exists()


def test_the_module_is_a_command(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "latent_jax.convert", f"--checkpoint={tmp_path}", f"--output={tmp_path / 'out'}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: {tmp_path}: not a checkpoint directory")


def test_convert_raises_rather_than_exits_when_called_from_python(tmp_path):
    with pytest.raises(UserError):
        convert.convert(str(tmp_path / "nowhere"), tmp_path / "out")


@pytest.fixture(scope="module")
def workdir(made, tmp_path_factory):
    """A run's workdir with two steps, trained weights as fp32 masters: step 20 is the source, step 10 its double."""
    directory = tmp_path_factory.mktemp("run")
    config = schema.resolve(schema.default())
    schema.write(config, directory / CONFIG)
    hf_export.keep_origin(made, directory / ORIGIN)
    vlm = {f"vlm.{path}": array.astype(jnp.float32) for path, array in hf_io.load(made).items()}
    structure = Run.of(directory).structure
    heads = {path: jnp.full(structure.shape(path), 0.5) for path in structure.variables if path.startswith("head.")}
    assert heads
    frozen = {path: vlm.pop(path) for path in list(vlm) if path.startswith("vlm.vision.")}
    with Checkpoints(directory / CHECKPOINTS) as checkpoints:
        for step, scale in ((10, 2), (20, 1)):
            trainable = {path: array * scale for path, array in {**vlm, **heads}.items()}
            checkpoints.save(step, {"trainable": trainable, "frozen": frozen}, {})
    return directory


def test_a_workdir_is_exported_at_its_newest_step_with_its_head(made, workdir, tmp_path):
    run(f"--checkpoint={workdir}", f"--output={tmp_path / 'out'}")
    expected = {hf_names.normalise(name): tensor for name, tensor in tiny_hf.read(made).items()}
    assert tiny_hf.same_bits(tiny_hf.read(tmp_path / "out"), expected)
    assert (tmp_path / "out" / "chat_template.jinja").exists()
    tensors, latent = hf_export.load_latent(tmp_path / "out")
    assert latent == Run.of(workdir).latent()
    assert tensors and all((tensor == 0.5).all() for tensor in tensors.values())


@pytest.mark.parametrize("form", ["flag", "path"])
def test_a_workdirs_step_is_exported(made, workdir, tmp_path, form):
    path, flags = (workdir, ["--step=10"]) if form == "flag" else (workdir / CHECKPOINTS / "10", [])
    run(f"--checkpoint={path}", f"--output={tmp_path / 'out'}", *flags)
    name = "model.layers.2.mlp.down_proj.weight"
    before, after = hf_io.Checkpoint.open(made).tensors[name], tiny_hf.read(tmp_path / "out")[name]
    assert (after.float().numpy() == 2 * before.astype("float32")).all()


def test_a_step_that_is_not_there_is_named(workdir, tmp_path):
    with pytest.raises(UserError, match="no checkpoint of step 15; there are 10, 20"):
        convert.convert(str(workdir), tmp_path / "out", step=15)
    assert not list(tmp_path.iterdir())
