"""Every config file and every variant of it describes a run that the schema takes."""

import importlib.util
from pathlib import Path

import pytest

from latent_jax.config import schema
from latent_jax.errors import UserError

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SIZES = [f"qwen2_5_vl_{size}" for size in ("3b", "7b", "32b", "72b")]
# Every file's variants, the default last.
VARIANTS = {
    "pretrain": [*SIZES, ""],
    "tiny_vl": ["captions", "questions", ""],
    "evaluate": [""],
    "finetune": [*SIZES, *(f"{size}_imagine" for size in SIZES), "imagine", ""],
}


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def resolved(name: str, variant: str):
    module = load(name)
    return schema.resolve(module.get_config(variant) if variant else module.get_config())


def test_every_file_is_listed_here():
    assert {file.stem for file in CONFIGS.glob("*.py")} == VARIANTS.keys()


@pytest.mark.parametrize(("name", "variant"), [(name, v) for name, vs in VARIANTS.items() for v in vs])
def test_every_variant_is_a_whole_config(name, variant):
    config = resolved(name, variant)
    assert (config.model.path == "") == (not variant.startswith("qwen"))


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "evaluate"])
def test_an_unknown_variant_names_the_known_ones(name):
    with pytest.raises(UserError, match=rf"configs/{name}.py: no variant 'other'; expected .*{VARIANTS[name][0]}"):
        load(name).get_config("other")


@pytest.mark.parametrize("name", VARIANTS)
def test_every_file_holds_its_command(name):
    assert f"--config=configs/{name}.py" in load(name).__doc__ or f"make {name}" in load(name).__doc__


def test_imagining_is_a_method_of_its_own():
    assert resolved("finetune", "").method == "sft"
    assert resolved("finetune", "imagine").method == resolved("finetune", "qwen2_5_vl_7b_imagine").method == "imagine"
