"""The command line: what it takes, and its one line for what it does not."""

import dataclasses
import subprocess
import sys
import types
from pathlib import Path

import pytest

from latent_jax import main, methods
from latent_jax.config import schema
from latent_jax.config.fields import option
from latent_jax.config.training import Config
from latent_jax.errors import UserError
from latent_jax.methods.contract import Method


@dataclasses.dataclass(frozen=True)
class Loss:
    weight: float = option(1.0, "weight", low=0)


@dataclasses.dataclass(frozen=True)
class StandInConfig(Config):
    loss: Loss = Loss()


CONFIG = """
from latent_jax.config.schema import default
from latent_jax.errors import UserError

def get_config(variant=""):
    config = default("stand_in")
    config.train.steps = 7
    if variant == "oops":
        config.train.batch_sise = 1
    elif variant:
        raise UserError(f"no variant {variant!r}; expected one of oops")
    return config
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    module = types.ModuleType("latent_jax.methods.stand_in")
    nothing = lambda *_: None  # noqa: E731
    module.METHOD = Method(StandInConfig, layout=nothing, coefficients=nothing, weights=nothing, loss=nothing)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    # config_flags loads every config file under this one name, on top of what the last one left there.
    monkeypatch.delitem(sys.modules, "config_config", raising=False)
    methods.find.cache_clear()
    schema.schema.cache_clear()
    path = tmp_path / "small.py"
    path.write_text(CONFIG)
    return path


def test_config_workdir_and_overrides(file):
    config, workdir = main.parse(
        [
            f"--config={file}",
            "--workdir=out",
            "--config.train.steps=9",
            "--config.loss.weight",
            "0.5",
            "--noconfig.log.progress",
        ]
    )
    assert (config.train.steps, config.loss.weight, config.log.progress) == (9, 0.5, False)
    assert workdir == Path("out")


def test_arguments_may_stand_apart_and_in_any_order(file):
    config, workdir = main.parse(["--config.train.steps", "9", "--workdir", "out", "--config", str(file)])
    assert (config.train.steps, workdir) == (9, Path("out"))


def test_a_workdir_that_is_not_utf_8_is_refused_by_name(file):
    with pytest.raises(UserError, match=r"--workdir: got 'runs/\\udcff', expected a name in UTF-8"):
        main.parse([f"--config={file}", "--workdir=runs/\udcff"])


def test_a_workdir_that_the_locale_names_otherwise_than_utf_8_is_refused(file, monkeypatch):
    monkeypatch.setattr(main.os, "fsencode", lambda name: name.encode("latin-1"))
    with pytest.raises(UserError, match="or in ASCII where the locale is another"):
        main.parse([f"--config={file}", "--workdir=runs/\N{LATIN SMALL LETTER E WITH ACUTE}"])
    assert main.parse([f"--config={file}", "--workdir=runs/e"])[1] == Path("runs/e")


def test_the_workdir_is_named_after_config_and_variant():
    assert main._default_workdir("configs/pretrain.py") == "runs/pretrain"
    assert main._default_workdir("configs/pretrain.py:qwen2_5_vl_7b") == "runs/pretrain_qwen2_5_vl_7b"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"--config is missing: expected a config file"),
        (["--config=nowhere.py"], r"--config=nowhere\.py: no such file: nowhere\.py"),
        (["--config={file}", "--wrkdir=x"], r"--wrkdir: no such flag"),
        (["--config={file}", "stray"], r"stray: expected only --config"),
        (["--config={file}", "--workdir="], r"--workdir: got '', expected a directory"),
        (["--config={file}:huge"], r"no variant 'huge'; expected one of oops"),
        (["--config={file}:oops"], r"config\.train\.batch_sise: no such key; did you mean 'batch_size'\?"),
        (["--config={file}", "--config.train.stpes=3"], r"config\.train\.stpes: no such key; did you mean 'steps'\?"),
        (
            ["--config={file}", "--config.train.steps=abc"],
            r"config\.train\.steps: got 'abc', expected an integer in 1\.\.",
        ),
        (
            ["--config={file}", "--config.log.progress=maybe"],
            r"log\.progress: got 'maybe', expected true or false",
        ),
    ],
)
def test_bad_input_is_one_line(file, arguments, message):
    with pytest.raises(UserError, match=message) as raised:
        main.parse([argument.format(file=file) for argument in arguments])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config():\n    return 1 / 0\n", r"small\.py:2: ZeroDivisionError: division by zero"),
        ("def get_config():\n    return int('x')\n", r"small\.py:2: ValueError: invalid literal for int"),
        ("import nonesuch_module\n", r"small\.py:1: ModuleNotFoundError: No module named 'nonesuch_module'"),
        ("def get_config(:\n", r"small\.py:1: SyntaxError"),
        ("x = 1\n", r"small\.py: AttributeError: .*get_config"),
        ("def get_config():\n    pass\n", r"small\.py: get_config\(\) returned None, expected"),
    ],
)
def test_a_broken_config_file_names_its_line(file, text, message):
    file.write_text(text)
    with pytest.raises(UserError, match=message) as raised:
        main.parse([f"--config={file}"])
    assert "\n" not in str(raised.value)


def test_help_lists_every_setting_with_its_meaning(file, capsys):
    with pytest.raises(SystemExit) as ended:
        main.parse([f"--config={file}", "--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    assert "--config.train.steps=7" in shown and "--config.loss.weight=1.0" in shown
    assert "peak learning rate (a number >= 0)" in shown


def test_the_command_prints_one_error_line_and_exits_2(tmp_path):
    ended = subprocess.run(
        [sys.executable, "-m", "latent_jax.main", "--config=nowhere.py", f"--workdir={tmp_path}/run"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 2
    assert ended.stderr == "error: --config=nowhere.py: no such file: nowhere.py\n"
    assert ended.stdout == "" and not (tmp_path / "run").exists()


def test_the_job_gets_config_and_workdir(file, monkeypatch, tmp_path):
    seen, job = [], types.ModuleType("latent_jax.train")
    job.run = lambda config, workdir: seen.append((config.train.steps, workdir))
    monkeypatch.setitem(sys.modules, "latent_jax.train", job)
    monkeypatch.setattr(sys, "argv", ["main", f"--config={file}", f"--workdir={tmp_path}"])
    main.main()
    assert seen == [(7, tmp_path)]


def test_a_reader_that_has_seen_enough_is_no_error():
    """`--help | head -1`: the status that a shell gives for SIGPIPE, and not a word."""
    command = [sys.executable, "-m", "latent_jax.main", "--help"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=Path(__file__).parents[1])
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == (b"", 141)
