"""`bench`: parity's verdict on equal and wrong checkpoints and bad input; and that both sides of a race do the same."""

import importlib.util
import json

import jax.numpy as jnp
import pytest

from latent_jax import bench
from latent_jax.models import hf_io
from latent_jax.perf import parity, timing
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
    directory = saved("deep")[0]
    capsys.readouterr()  # what saving it said

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
    assert "CPU build first" in (line := error(f"--model={directory}")) and "'.[bench]'" in line


# ---------------------------------------------------------------- timed: what they compute, never how fast


@pytest.fixture
def timed(tmp_path, monkeypatch, capsys):
    """Runs one timed measurement on one core and one device: (its numbers, what it printed)."""
    monkeypatch.setattr(timing, "cores", lambda: 1)

    def run_timed(what, *arguments):
        file = tmp_path / "kept" / f"{what}.json"
        with pytest.raises(SystemExit) as ended:
            bench.main([f"--what={what}", "--repeats=1", f"--output={file}", *arguments])
        assert ended.value.code == 0
        numbers, printed = json.loads(file.read_text()), capsys.readouterr().out
        assert str(file) in printed and numbers["versions"]["torch"] and numbers["load_average"]
        return numbers, printed

    return run_timed


def test_generate_gives_the_same_tokens(timed):
    """Sixteen prompts of four kinds on the embedded model, of which twelve end early."""
    numbers, printed = timed("generate", "--max_new_tokens=24")
    assert numbers["rows_equal"] == numbers["rows"] == 16
    assert 16 < numbers["new_tokens"] < 16 * 24 and len(set(numbers["prompt_tokens"])) > 3
    sides = [side["median_seconds"] for name, side in numbers.items() if name.startswith("torch")]
    assert numbers["ratio"] == pytest.approx(min(sides) / numbers["ours"]["median_seconds"])
    assert f"ratio {numbers['ratio']:.2f} " in printed
    assert {"ours", "torch, 1 thread", "ours, text to text"} <= numbers.keys()


def test_step_takes_the_same_steps(timed):
    """Four batches of a mixture, twice over: the losses stay together through eight updates."""
    numbers, _ = timed("step", "--batch=4", f"--model={saved('first_full_tied')[0]}")
    ours, theirs = numbers["losses"]["ours"], numbers["losses"]["torch, 1 thread"]
    assert len(ours) == 4 and numbers["first_loss_difference"] < 1e-5
    assert ours == pytest.approx(theirs, rel=1e-3) and len(set(ours)) == 4
    assert numbers["padded_rows"] and numbers["needed_flops"]["text"] > numbers["needed_flops"]["vision"] > 0


def test_load_and_data(timed):
    numbers, printed = timed("load", "--width=256", "--layers=1")
    for side in (numbers["load"], numbers["export"]):
        ours, theirs = (side[name]["median_seconds"] for name in ("ours", "transformers"))
        assert side["ratio"] == pytest.approx(theirs / ours)
    assert numbers["bytes"] > 4 * 3 * 256 * 1376 and set(numbers["overhead_bytes"]) == {"load", "export"}
    assert printed.startswith("load: 0.0")
    numbers, _ = timed("data", "--against=none")
    assert numbers["patches"] == [74 * 54, 588] and "transformers" not in numbers


def test_checkpoints_with_checksums_and_without(timed):
    numbers, printed = timed("checkpoint", "--against=none", "--width=256", "--layers=1")
    assert numbers["bytes"] > 3 * 4 * 3 * 256 * 1376  # the weights and two moments, in float32
    for what in ("save", "restore"):
        assert numbers[what]["with"]["GB_per_second"] > 0 and numbers[what]["without"]["GB_per_second"] > 0
    assert set(numbers["held_seconds"]) == {"with", "without"} and "a save holds the loop" in printed


def test_sides_take_turns():
    calls = []
    times = timing.alternate({name: lambda name=name: calls.append(name) for name in ("a", "b")}, 3, warm_up=2)
    assert calls == ["a", "b"] * 5
    assert all(len(each.wall) == len(each.processor) == 3 for each in times.values())
    lines, numbers = timing.compared(
        "things", 6, {"ours": timing.Times([2, 1, 9], [1, 1, 1]), "x": timing.Times([8, 8, 8], [3, 3, 3]),
                      "y": timing.Times([6, 7, 5], [4, 4, 4])}
    )  # fmt: skip
    assert numbers["ours"]["things_per_second"] == 3
    assert (numbers["ratio"], numbers["processor_ratio"]) == (3, 3)
    assert len(lines) == 4


def test_bad_input_of_timed_ones(capsys):
    directory = saved("deep")[0]
    capsys.readouterr()  # what saving it said
    for what, arguments, words in (
        ("step", ["--layers=2"], "--width"),
        ("step", ["--width=100"], "multiple of 256"),
        ("load", [f"--model={directory}", "--width=256"], "--model and --width"),
        ("data", ["--repeats=0"], "--repeats: got 0"),
        ("generate", ["--batch=0"], "--batch: got 0"),
        ("checkpoint", ["--against=torch"], "--against=torch: a checkpoint has nothing"),
        ("step", ["--examples=all"], "--examples: got 'all'"),
    ):
        with pytest.raises(SystemExit) as ended:
            bench.main([f"--what={what}", *arguments])
        assert ended.value.code == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and words in lines[0]
