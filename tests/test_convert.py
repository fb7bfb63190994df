"""The convert command: round trips of HF directories, exports of workdirs, and bad input."""

import json
import shutil
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from latent_jax import convert
from latent_jax.config import schema
from latent_jax.data.image_spec import ImageSpec
from latent_jax.errors import UserError
from latent_jax.models import hf_export, hf_io
from latent_jax.models.card import stated_license
from latent_jax.models.qwen2_5_vl import hf_names
from latent_jax.runtime import files
from latent_jax.runtime.checkpoints import Checkpoints
from latent_jax.training.latent_config import document
from latent_jax.training.workdir import CHECKPOINTS, CONFIG, FINISHED, ORIGIN, Run, card
from tests.models import tiny_hf
from tests.reference import small


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tiny_hf.write(tmp_path_factory.mktemp("made") / "hf", dtype=torch.bfloat16, sharded=True, new_names=True)


def run(*flags):
    convert.main([*map(str, flags)])


def notes(capsys) -> list[str]:
    """What an export says before the last line, which names what was written."""
    *said, last = capsys.readouterr().err.splitlines()
    assert ": HF checkpoint of " in last
    return said


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
    (("--checkpoint=%/empty", "--output=%/run/checkpoints/30"), "stands among the files of the run"),
    (("--checkpoint=%/empty", "--output=%/run/hf_files/new"), "stands among the files of the run"),
    (("--checkpoint=%/empty", "--output=/"), "which no export writes"),
    (("--checkpoint=/", "--output=%/out"), "/: not a checkpoint directory"),
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
    assert latent == json.loads(json.dumps(document(Run.of(workdir).config))) and latent["method"] == "pretrain"
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


# ---------------------------------------------------------------- what is said, and what the card tells


def test_values_that_are_not_finite_are_kept_and_said(tmp_path, capsys):
    source = tiny_hf.write(tmp_path / "hf", dtype=torch.bfloat16)
    capsys.readouterr()  # what saving it said
    names = ["model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight", "visual.merger.mlp.0.bias"]
    for count, bad in ((0, []), (2, names[1:]), (3, names)):
        tiny_hf.change(source, lambda tensors, bad=bad: [tensors[name].view(-1)[3:5].fill_(torch.nan) for name in bad])
        run(f"--checkpoint={source}", f"--output={tmp_path / 'out'}")
        said = notes(capsys)
        assert len(said) == bool(count) and all(name in line for line in said for name in bad)
        assert all(line.startswith("kept, though not finite (NaN or infinite): ") for line in said)
        assert tiny_hf.same_bits(tiny_hf.read(tmp_path / "out"), tiny_hf.read(source))
    with pytest.raises(SystemExit):  # in another dtype it is a new checkpoint, and those are finite
        run(f"--checkpoint={source}", f"--output={tmp_path / 'new'}", "--dtype=float32")
    assert f"'{names[0]}' has values that are not finite" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_head_that_is_not_finite_is_kept_and_said(tmp_path, capsys):
    source = tiny_hf.write(tmp_path / "hf")
    capsys.readouterr()  # what saving it said
    head = {"slots": np.array([[1, np.inf]], np.float32), "scale": np.float32(2)}
    hf_export.save_latent(source, head, {"grid": 1}, unsound := [])
    assert unsound == ["slots"]
    run(f"--checkpoint={source}", f"--output={tmp_path / 'out'}")
    assert notes(capsys) == ["kept, though not finite (NaN or infinite): values of slots"]
    tensors, settings = hf_export.load_latent(tmp_path / "out")
    assert settings == {"grid": 1}
    np.testing.assert_array_equal(tensors["slots"], head["slots"])


def test_many_tensors_are_counted(tmp_path, capsys):
    source = tiny_hf.write(tmp_path / "hf")
    capsys.readouterr()  # what saving it said
    tiny_hf.change(source, lambda tensors: [tensor.view(-1)[:1].fill_(torch.inf) for tensor in tensors.values()])
    run(f"--checkpoint={source}", f"--output={tmp_path / 'out'}")
    (said,) = notes(capsys)
    assert said.endswith(f" and {len(tiny_hf.read(source)) - 5} more")


def test_a_readme_of_ones_own_is_kept_and_said(made, tmp_path, capsys):
    run(f"--checkpoint={made}", f"--output={tmp_path / 'out'}")
    assert notes(capsys) == []
    (tmp_path / "out" / "README.md").write_text("my own")
    run(f"--checkpoint={made}", f"--output={tmp_path / 'out'}")
    assert capsys.readouterr().err.startswith(f"{tmp_path / 'out' / 'README.md'}: your own, kept; remove it for ")
    assert (tmp_path / "out" / "README.md").read_text() == "my own"


LIMITS = dict(min_pixels=28 * 28 * 2, max_pixels=28 * 28 * 9)


def small_run(directory, *, kept=None, data=LIMITS):
    """A finished run of two steps, all weights zero. kept: limits in its hf_files; data: of its config."""
    config = small.config(data=data)
    schema.write(config, directory / CONFIG)
    hf_export.keep_origin(small.directory(), directory / ORIGIN, **(kept or {}))
    structure = Run.of(directory).structure
    arrays = {path: jnp.zeros(structure.shape(path)) for path in structure.variables}
    with Checkpoints(directory / CHECKPOINTS) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, {"trainable": arrays}, {})
    return directory


def finish(directory, step, seal=files.sealed, **more):
    done = {"step": step, "settings": {}, "report": {"recall": 0.25, "words": "none"}, **more}
    (directory / FINISHED).write_text(json.dumps(seal(done)))


def exported(workdir, output, *flags):
    run(f"--checkpoint={workdir}", f"--output={output}", *flags)
    spec = ImageSpec.from_directory(output)
    hf_io.resolve(output)  # the checksums are those of what is there
    return {"min_pixels": spec.min_pixels, "max_pixels": spec.max_pixels}


def test_an_export_has_the_pixel_limits_of_training(tmp_path, capsys):
    workdir = small_run(tmp_path / "run", kept=LIMITS)
    assert exported(workdir, tmp_path / "out") == LIMITS
    assert notes(capsys) == []


def test_so_has_that_of_a_workdir_which_keeps_them_in_its_config_alone(tmp_path, capsys):
    assert exported(small_run(tmp_path / "run"), tmp_path / "out") == LIMITS
    stated = "min_pixels 1568, max_pixels 7056"
    assert notes(capsys) == [f"the export states the pixel limits of training: {stated}"]


def test_a_workdir_that_never_knew_them_keeps_the_sources_and_says_so(tmp_path, capsys):
    workdir = small_run(tmp_path / "run", data={})
    spec = ImageSpec.from_directory(small.directory())
    source = {"min_pixels": spec.min_pixels, "max_pixels": spec.max_pixels}
    assert exported(workdir, tmp_path / "a") == source
    assert notes(capsys) == []  # its config says that they are the checkpoint's
    content = json.loads((workdir / CONFIG).read_text())
    for key in LIMITS:
        del content["data"][key]
    del content["checksum"]
    (workdir / CONFIG).write_text(json.dumps(content))
    assert exported(workdir, tmp_path / "b") == source
    (said,) = notes(capsys)
    assert said.startswith(f"{workdir / CONFIG}: does not say at which pixel limits the run trained; the export keeps ")
    assert f"max_pixels {spec.max_pixels}" in said


def test_the_card_has_the_runs_command_and_numbers_at_its_last_step(tmp_path):
    workdir = small_run(tmp_path / "run")
    finish(workdir, 2, command="python -m latent_jax.main --config=x")
    card = lambda: (tmp_path / "out" / "README.md").read_text()
    exported(workdir, tmp_path / "out")
    assert "| recall | 0.25 |" in card() and "words" not in card() and "2 steps" in card()
    assert "```\npython -m latent_jax.main --config=x\npython -m latent_jax.convert --checkpoint=" in card()
    exported(workdir, tmp_path / "out", "--step=1")
    assert "recall" not in card() and "latent_jax.main" in card() and "--step=1" in card() and "1 steps" in card()
    (workdir / FINISHED).unlink()
    exported(workdir, tmp_path / "out")
    assert "recall" not in card() and "```\npython -m latent_jax.convert" in card()


def test_notes_of_an_earlier_version_are_read_and_damaged_ones_are_named(tmp_path, capsys):
    workdir = small_run(tmp_path / "run")
    finish(workdir, 2, seal=dict)
    exported(workdir, tmp_path / "out")
    assert "| recall | 0.25 |" in (tmp_path / "out" / "README.md").read_text()
    finish(workdir, 2)
    whole = (workdir / FINISHED).read_text()
    for content in (whole.replace("0.25", "0.75"), "{}", "[]", whole[:-1], "", '{"step": "2", "report": {}}'):
        (workdir / FINISHED).write_text(content)
        with pytest.raises(SystemExit) as caught:
            exported(workdir, tmp_path / "new")
        said = capsys.readouterr().err.splitlines()[-1]
        assert caught.value.code == 2 and said.startswith(f"error: {workdir / FINISHED}: ")
        assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("front", "license"),
    [
        ("---\nlicense: apache-2.0\ntags:\n- x\n---\n# A model\nlicense: no\n", {"license": "apache-2.0"}),
        ("---\r\nlicense:  other \r\nlicense_name: 'x y'\r\n---\r\n", {"license": "other", "license_name": "x y"}),
        ('---\nlicense: "a\\"b"\n---\n', {"license": 'a"b'}),
        ("---\nlibrary_name: x\n---\nlicense: mit\n", {}),
        ("# license: mit\n", {}),
        ("---\nlicense:\n---\n", {}),
        (None, {}),
    ],
)  # fmt: skip
def test_a_card_names_the_license_that_the_base_model_states(made, tmp_path, front, license):
    source = tmp_path / "base"
    shutil.copytree(made, source)
    if front is not None:
        (source / "README.md").write_bytes(front.encode())
    hf_export.keep_origin(source, tmp_path / "hf_files")
    text = card(small.config(model={"init": "checkpoint"}), 1, {}, "", tmp_path / "hf_files").text(False)
    found = dict(line.split(": ", 1) for line in text.split("---\n")[1].splitlines())
    assert {key: json.loads(value) for key, value in found.items() if key.startswith("license")} == license
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "README.md").write_text(text)
    assert stated_license(tmp_path / "again") == license  # what is trained from the export states it too


def test_a_license_in_config_json_is_taken_where_no_card_has_one(tmp_path):
    (tmp_path / "config.json").write_text('{"license": "mit"}')
    assert stated_license(tmp_path) == {"license": "mit"}
    (tmp_path / "README.md").write_text("---\nlicense: bsd\n---\n")
    assert stated_license(tmp_path) == {"license": "bsd"}


def test_random_weights_have_no_license():
    assert "license" not in card(small.config(), 1, {}, "", small.directory()).text(False)


@pytest.mark.parametrize("here", [".", "./", ""])
def test_the_current_folder_is_a_checkpoint_as_any_other(made, tmp_path, here, monkeypatch):
    """It has no name of its own, which the file of its checksums would take."""
    shutil.copytree(made, tmp_path / "hf")
    monkeypatch.chdir(tmp_path / "hf")
    run(f"--checkpoint={here}", "--output=../out")
    expected = {hf_names.normalise(name): tensor for name, tensor in tiny_hf.read(made).items()}
    assert tiny_hf.same_bits(tiny_hf.read(tmp_path / "out"), expected)
    monkeypatch.chdir(tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text("{}")
    with pytest.raises(SystemExit):
        run(f"--checkpoint={here}", "--output=../again")  # which has checksums


@pytest.mark.parametrize("most", [100, 20_000])
def test_a_full_disk_names_the_file_of_the_export(made, tmp_path, most):
    command = [sys.executable, "-m", "latent_jax.convert", f"--checkpoint={made}", f"--output={tmp_path / 'out'}"]
    limited = f"import resource, os, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({most}, {most})); "
    limited += "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", limited, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    named = done.stderr.strip().splitlines()[-1]
    assert named.startswith(f"error: {tmp_path / '.out.partial'}/") and named.endswith(": File too large")
    assert not list(tmp_path.iterdir())
