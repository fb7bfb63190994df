"""The house (docs/architecture.md, Directions): which folder may import which, how long a file is, how far main is from
a loss, and that the documents name what is there.

Imports are read from the source of the whole package. Those inside functions count too, and so do modules that are
named in a string, as in `importlib.import_module(f"latent_jax.benchmarks.{name}")`.
"""

import ast
import functools
import re
import sys
from pathlib import Path

import pytest

from latent_jax import methods
from latent_jax.config import schema
from latent_jax.config.training import Config
from latent_jax.methods import sft

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "latent_jax"
FILES = sorted(PACKAGE.rglob("*.py"))

STORIES = {"main", "train", "evaluate"}
COMMANDS = {"generate", "convert", "prepare", "plan", "bench", "compare"}
# A folder imports from the levels below its own.
LEVELS = [
    {"errors"},
    {"ops", "assets", "benchmarks"},
    {"losses", "models", "runtime", "data"},  # data knows no model: its workers stay light
    {"config"},
    {"training", "methods"},
    {"inference", "evaluation"},
    {"perf", "analysis"},
    COMMANDS | STORIES,
]
RANK = {part: rank for rank, level in enumerate(LEVELS) for part in level}
# Within a level, these alone.
BESIDE = {
    ("models", "runtime"),  # how files are read and written
    ("data", "runtime"),
    ("training", "methods"),  # training asks methods.find and knows the contract; a method knows nothing of training
    ("plan", "main"),  # plan takes main's command line
}
# (a file or folder, what it imports): reason.
EXCEPTIONS = {
    ("models", "latent_jax.config.fields"): "a leaf that imports only errors: how a value is checked",
    ("data", "latent_jax.config.fields"): "the same",
    ("config/schema.py", "latent_jax.methods"): "a method declares its own sections of the config",
    ("__init__.py", "latent_jax.inference.vlm"): "latent_jax.load",
    ("__init__.py", "latent_jax.runtime.command"): "the package begins a command before anything slow is imported",
    ("generate.py", "latent_jax"): "latent_jax.load, as users call it",
    ("evaluate.py", "latent_jax"): "latent_jax.load, as users call it",
    ("methods/pretrain.py", "latent_jax.analysis.probe"): "METHOD.report: a name, imported after the last step",
    ("training/finish.py", "latent_jax.main"): "no import: the command that a model card shows",
}
# Longer than 400 lines, to be split.
LONG: set[str] = set()


def shown(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix()


@functools.cache
def modules() -> set[str]:
    return {
        ".".join(("latent_jax", *f.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__") for f in FILES
    }


def imported(source: str) -> set[str]:
    """The modules that a source imports or names: ours by their full names, others as they are written."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: expected an absolute import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (names & modules()) or {node.module}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            # "latent_jax.losses.similarity", or the beginning of an f-string: "latent_jax.losses.".
            name = node.value.rstrip(".")
            found |= {name} if name in modules() and "." in name else set()
    return found


@functools.cache
def imports() -> dict[str, set[str]]:
    """File -> what it imports."""
    return {shown(file): imported(file.read_text()) for file in FILES}


def ours(names: set[str]) -> set[str]:
    return {name for name in names if name.partition(".")[0] == "latent_jax"}


def part_of(file: str) -> str:
    return file.partition("/")[0].removesuffix(".py")


def excepted(file: str, name: str) -> bool:
    return any((place, name) in EXCEPTIONS for place in (file, part_of(file)))


def allowed(file: str, name: str) -> bool:
    """Whether a file of ours may import a module of ours."""
    if excepted(file, name):
        return True
    importer, part = part_of(file), name.split(".")[1] if "." in name else ""
    if part not in RANK or importer not in RANK:
        return False
    return importer == part or (importer, part) in BESIDE or RANK[part] < RANK[importer]


def test_imports_go_down_the_levels():
    wrong = [
        f"{file} imports {name}" for file, names in imports().items() for name in ours(names) if not allowed(file, name)
    ]
    assert not wrong, "\n".join(sorted(wrong))


def test_no_exception_outlives_its_reason():
    used = {(p, name) for file, names in imports().items() for name in names for p in (file, part_of(file))}
    assert EXCEPTIONS.keys() <= used
    assert ours(imports()["config/fields.py"]) == {"latent_jax.errors"}


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("ops/attention.py", "from latent_jax.models import heads"),
        ("runtime/hosts.py", "def late():\n    from latent_jax import methods"),
        ("methods/own.py", "import latent_jax.training.state"),
        ("data/chat.py", "from latent_jax.models.heads import LatentHead"),
        ("data/chat.py", "from latent_jax.config import fields, schema"),
        ("evaluation/paired.py", "from latent_jax.inference import vlm"),
        ("training/loop.py", "import importlib\nimportlib.import_module('latent_jax.analysis.probe')"),
        ("losses/own.py", "import importlib\nimportlib.import_module(f'latent_jax.methods.{name}')"),
    ],
)
def test_an_import_upwards_is_found(file, source):
    assert not all(allowed(file, name) for name in ours(imported(source)))


def test_losses_and_ops_import_nothing_else_of_ours():
    for file, names in imports().items():
        if part_of(file) in ("losses", "ops"):
            assert {name.split(".")[1] for name in ours(names)} <= {"losses", "ops"}, file


def test_only_bench_and_plan_import_perf():
    users = {part_of(file) for file, names in imports().items() for name in names if name.startswith("latent_jax.perf")}
    assert users == {"bench", "plan", "perf"}


def test_workers_stay_light():
    """Data and benchmarks know neither the accelerator's libraries nor a model, nor what they reach through others."""
    heavy = {"jax", "jaxlib", "flax", "optax", "orbax", "torch"}
    left = [file for file in imports() if part_of(file) in ("data", "benchmarks")]
    names = {name: file for file in imports() for name in [".".join(["latent_jax", *Path(file).with_suffix("").parts])]}
    names = {name.removesuffix(".__init__"): file for name, file in names.items()}
    seen = set(left)
    while left:
        file = left.pop()
        found = {name.partition(".")[0] for name in imports()[file]}
        assert not found & heavy, f"{file}: {found & heavy}"
        reached = {names[name] for name in ours(imports()[file])} - seen
        seen |= reached
        left += reached
    assert not any(part_of(file) in ("models", "methods", "training") for file in seen)


def test_the_package_has_these_parts_and_no_others():
    found = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py"}
    assert found == STORIES | COMMANDS | {"errors", "__init__"}
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.rglob("*.py"))}
    assert folders == set().union(*LEVELS) - STORIES - COMMANDS - {"errors"}


def test_no_file_is_longer_than_400_lines():
    assert {shown(file) for file in FILES if len(file.read_text().splitlines()) > 400} == LONG


# ---------------------------------------------------------------- main to loss in three hops


def functions(file: str) -> dict[str, ast.FunctionDef]:
    tree = ast.parse((PACKAGE / file).read_text())
    return {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def called(function: ast.AST) -> set[str]:
    """What a function calls, as it is written: `make_step`, `method.loss`."""
    return {ast.unparse(node.func) for node in ast.walk(function) if isinstance(node, ast.Call)}


def reached(file: str, first: str) -> set[str]:
    """What a function calls, itself or through functions of its own file."""
    own, left, found = functions(file), [first], set()
    while left:
        calls = called(own[left.pop()]) - found
        found |= calls
        left += calls & own.keys()
    return found


def test_main_to_loss_in_three_hops():
    # main -> train: the job that the config names, `train` unless told otherwise.
    source = ast.unparse(functions("main.py")["main"])
    assert re.search(r"import_module\(f'latent_jax\.\{name\}'\) for name in \(config\.job,", source)
    assert Config.job == "train" and "job.run" in called(functions("main.py")["main"])
    # train -> make_step, of training/step.py.
    assert "make_step" in reached("train.py", "run")
    assert "from latent_jax.training.step import make_step" in (PACKAGE / "train.py").read_text()
    # make_step -> the loss of the method that the config names.
    assert "method.loss" in called(functions("training/step.py")["make_step"])
    assert sft.METHOD.loss is sys.modules[sft.__name__].loss


# ---------------------------------------------------------------- the documents

DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "third_party" / "README.md"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_documents_name_files_and_settings_that_are_there(document):
    text = document.read_text()
    roots = [document.parent, ROOT, PACKAGE, *(path for path in PACKAGE.iterdir() if path.is_dir())]
    roots += [PACKAGE / "data" / "builders", PACKAGE / "models" / "qwen2_5_vl"]
    files = set(re.findall(r"`([a-z_0-9./]+/[a-z_0-9]+\.(?:py|sh|md|yaml))(?::[a-z_0-9]+)?`", text))
    files |= set(re.findall(r"--config=([a-z_/]+\.py)", text))
    assert not [name for name in files if not any((root / name).exists() for root in roots)]
    modules_named = set(re.findall(r"python -m (latent_jax\.[a-z_.]+)", text))
    assert modules_named <= modules() | {name + "." for name in modules()}
    configs = [schema.default(name) for name in methods.names()] + [schema.default_evaluation()]
    known = {key for config in configs for key in schema.leaves(schema.resolve(config))}
    settings = set(re.findall(r"--config\.([a-z_0-9]+(?:\.[a-z_0-9]+)*)=", text)) - {"a.b"}
    assert settings <= known
