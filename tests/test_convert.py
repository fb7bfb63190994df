"""The convert command: round trips of HF directories, exports of workdirs, and bad input."""

import subprocess
import sys

import pytest
import torch

from latent_jax import convert
from latent_jax.errors import UserError
from latent_jax.models.qwen2_5_vl import hf_names
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
