"""Flags -> config -> the job that it names.

    python -m latent_jax.main --config=configs/NAME.py[:VARIANT] [--workdir=DIR] [--config.a.b=value ...]

--config    the config file; its docstring names the VARIANTs (models, mostly; none = the embedded tiny one)
--workdir   where the run leaves everything; run again with the same one, it resumes. Default: runs/NAME[_VARIANT]
--config.*  changes one setting of the config file
"""

import contextlib
import importlib
import os
import re
import sys
import traceback
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from latent_jax.config import schema
from latent_jax.config.evaluation import Evaluation
from latent_jax.config.training import Config
from latent_jax.errors import Stopped, UserError
from latent_jax.runtime.command import command

_OVERRIDE = re.compile(r"--?(no)?config\.([^=]+)(?:=(.*))?", re.DOTALL)


def parse(arguments: list[str]) -> tuple[Config | Evaluation, Path]:
    """Reads the command line (without the program's name): the resolved config and the workdir.

    Raises UserError for whatever is wrong with it, and SystemExit(0) after printing the help.
    """
    overrides, rest = _split(arguments)
    parsed = flags.FlagValues()
    flags.DEFINE_boolean("help", False, "show this help", short_name="h", flag_values=parsed)
    flags.DEFINE_string("workdir", None, "where the run leaves everything", flag_values=parsed)
    config_flags.DEFINE_config_file("config", lock_config=False, flag_values=parsed, sys_argv=[])
    path = next((argument.partition("=")[2] for argument in rest if argument.startswith("--config=")), "")
    extra = _parse_flags(parsed, rest, path)
    if parsed.help:
        print(f"{__doc__}\nSettings and their values ({path or 'the defaults of pretrain'}):\n")
        print(schema.describe(schema.resolve(parsed.config or schema.default())))
        raise SystemExit(0)
    if extra:
        raise UserError(f"{extra[0]}: expected only --config=FILE, --workdir=DIR and --config.KEY=VALUE; see --help")
    if parsed.config is None:
        raise UserError("--config is missing: expected a config file, as in --config=configs/pretrain.py")
    if parsed.workdir == "":
        raise UserError("--workdir: got '', expected a directory; leave the flag out for runs/NAME")
    schema.override(parsed.config, overrides)
    return schema.resolve(parsed.config), _checked(parsed.workdir or _default_workdir(path))


@command
def main() -> None:
    """The command: exits with status 2 and one line on standard error for bad input."""
    config, workdir = parse(sys.argv[1:])
    # grain asks absl for its own flags, which this program leaves at their defaults.
    flags.FLAGS.mark_as_parsed()
    # Only now: a typo is answered at once, not after jax has started its backend.
    job, hosts = (importlib.import_module(f"latent_jax.{name}") for name in (config.job, "runtime.hosts"))
    # An evaluation is one host's work and has no such section.
    with hosts.joined(config.hosts) if isinstance(config, Config) else contextlib.nullcontext():
        summary = job.run(config, workdir)
        if stopped := getattr(summary, "stopped", 0):
            raise Stopped(stopped)


def _split(arguments: list[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Takes the --config.a.b settings out: ((key, text), ...) in order, and the other arguments.

    The forms are absl's: --config.a=1, --config.a 1, and for booleans --config.a and --noconfig.a.
    """
    overrides, rest, left = [], [], list(arguments)
    while left:
        argument = left.pop(0)
        match = _OVERRIDE.fullmatch(argument)
        if not match:
            # Absl's `--config FILE` and `--workdir DIR`, in the one form that the rest of this file knows.
            rest.append(f"{argument}={left.pop(0)}" if argument in ("--config", "--workdir") and left else argument)
            continue
        negated, key, text = match.groups()
        if text is None and not negated and left and not left[0].startswith("--"):
            text = left.pop(0)
        overrides.append((key, "false" if negated else "true" if text is None else text))
    return overrides, rest


def _parse_flags(parsed: flags.FlagValues, rest: list[str], path: str) -> list[str]:
    file = path.partition(":")[0]
    if file and not Path(file).is_file():
        raise UserError(f"--config={path}: no such file: {file}")
    try:
        extra = parsed(["latent_jax.main", *rest])[1:]
    except UserError:
        raise
    except flags.UnrecognizedFlagError as problem:
        raise UserError(f"--{problem.flagname}: no such flag; see --help") from None
    except Exception as problem:
        raise _config_file_error(file, problem) from None
    if file and not isinstance(parsed.config, ConfigDict):
        raise UserError(f"{file}: get_config() returned {parsed.config!r}, expected a ConfigDict")
    return extra


def _config_file_error(file: str, problem: BaseException) -> UserError:
    """One line for what a config file raised: its place and its own message, without absl's wrapping."""
    while problem.__context__ and (isinstance(problem, flags.Error) or str(problem).startswith("Error whilst parsing")):
        problem = problem.__context__
    lines = [frame.lineno for frame in traceback.extract_tb(problem.__traceback__) if frame.filename == file]
    if isinstance(problem, SyntaxError):
        lines, problem = [problem.lineno], SyntaxError(problem.msg)
    place = f"{file}:{lines[-1]}" if lines else file
    return UserError(f"{place}: {type(problem).__name__}: {' '.join(str(problem).split())}")


def _checked(workdir: str) -> Path:
    """The workdir. Raises UserError where its name is another to TensorStore, which takes UTF-8 whatever the locale."""
    try:
        same = os.fsencode(workdir) == workdir.encode()
    except UnicodeEncodeError:
        same = False
    if not same:
        raise UserError(
            f"--workdir: got {workdir!r}, expected a name in UTF-8, or in ASCII where the locale is another"
        )
    return Path(workdir)


def _default_workdir(path: str) -> str:
    file, _, variant = path.partition(":")
    return "runs/" + Path(file).stem + (f"_{variant}" if variant else "")


if __name__ == "__main__":
    main()
