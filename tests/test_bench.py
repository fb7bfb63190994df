"""`bench --what=parity`: its verdict on an equal checkpoint, on one wrong bias, and on bad input."""

import importlib.util
import json

import jax.numpy as jnp
import pytest

from latent_jax import bench, parity
from latent_jax.models import hf_io
from tests.reference.checkpoints import saved


def run(*arguments) -> int:
    with pytest.raises(SystemExit) as ended:
        bench.main(["--what=parity", "--max_new_tokens=4", *map(str, arguments)])
    return ended.value.code


def test_an_equal_checkpoint_is_ok_in_float32(tmp_path, capsys):
    assert run(f"--model={saved('deep')[0]}", "--dtype=float32", f"--output={tmp_path / 'parity.json'}") == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == "parity: ok"
    found = json.loads((tmp_path / "parity.json").read_text())
    assert found["verdict"] == "ok"
    assert found["versions"]["torch"]
    assert [each["prompt"] for each in found["comparisons"]] == ["image", "text"]
    vision = [f"vision.{name}" for name in ("patch", *(f"blocks.{i}" for i in range(4)), "merger")]
    text = [*(f"text.blocks.{i}" for i in range(4)), "text.norm", "logits"]
    for comparison, names in zip(found["comparisons"], ([*vision, *text], text), strict=True):
        assert [layer["name"] for layer in comparison["layers"]] == names
        assert all(layer["relative"] < 1e-5 and layer["ratio"] is None for layer in comparison["layers"])
        assert comparison["parts_at"] is None
        assert len(comparison["tokens"]) == 4
    assert all(name in printed for name in [*vision, *text])


def test_bfloat16_is_judged_by_torchs_own_rounding(monkeypatch, tmp_path, capsys):
    image = {"image": parity.prompts()["image"]}
    monkeypatch.setattr(parity, "prompts", lambda: image)
    assert run(f"--model={saved('deep')[0]}", "--dtype=bfloat16", f"--output={tmp_path / 'parity.json'}") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "parity: ok"
    (comparison,) = json.loads((tmp_path / "parity.json").read_text())["comparisons"]
    assert all(0.3 < layer["ratio"] < 2 and 1e-4 < layer["yardstick"] < 0.1 for layer in comparison["layers"])


@pytest.mark.parametrize(
    ("path", "layer", "expected"),
    [
        ("vision.blocks.qkv_bias", 2, "vision.blocks.2"),
        ("text.blocks.k_bias", 1, "text.blocks.1"),
        ("text.lm_head", None, "logits"),
    ],
)
def test_one_wrong_weight_is_found_at_its_layer(path, layer, expected, monkeypatch, capsys):
    load = hf_io.load

    def wrong(directory, config, *, dtype):
        arrays = load(directory, config, dtype=dtype)
        at = jnp.s_[:] if layer is None else layer
        return arrays | {path: arrays[path].at[at].multiply(1.01)}

    monkeypatch.setattr(hf_io, "load", wrong)
    assert run(f"--model={saved('deep')[0]}", "--dtype=float32") == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"parity: FAILED at {expected} (float32, ")


def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys):
    def error(*arguments):
        assert run(*arguments) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        return lines[0]

    assert "nowhere" in error(f"--model={tmp_path / 'nowhere'}")
    assert "--max_new_tokens" in error("--max_new_tokens=0")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert "latent_jax.convert" in error(f"--model={tmp_path / 'run'}")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "latent_jax[bench]" in error(f"--model={saved('deep')[0]}")
