"""Benchmarks score where no model could run, and declare what an evaluation asks of them."""

import importlib
import inspect
import subprocess
import sys

import pytest

from latent_jax.benchmarks import gqa
from latent_jax.config import evaluation
from latent_jax.evaluation.answering import most_tokens


def test_they_import_without_models():
    modules = ", ".join(f"latent_jax.benchmarks.{name}" for name in evaluation.benchmarks())
    heavy = "{'jax', 'flax', 'torch', 'transformers', 'tensorflow_datasets', 'PIL'}"
    code = f"import sys, {modules}; assert not {heavy} & sys.modules.keys(), {heavy} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", evaluation.benchmarks())
def test_they_are_alike(name):
    module = importlib.import_module(f"latent_jax.benchmarks.{name}")
    assert module.SCORERS[0] == "official" and module.PROMPT.keys() == set(module.SCORERS)
    assert (
        module.SPLITS
        and all(most_tokens(module, scorer) > 0 for scorer in module.SCORERS)
        and isinstance(module.PUBLISHED, dict)
    )
    for function in ("check", "cluster", "prompt", "answer", "parse", "correct"):
        declared = inspect.signature(getattr(gqa, function)).parameters.keys()
        assert inspect.signature(getattr(module, function)).parameters.keys() == declared
    assert list(inspect.signature(module.report).parameters)[:3] == ["scored", "scorer", "seed"]


def test_those_of_the_documentation_are_found():
    assert {"blink", "gqa", "mmvp", "scienceqa", "vsp", "vstar"} <= set(evaluation.benchmarks())
