"""A config is typed. `make lint` checks this file with mypy: a wrong type, and an ignore without need, is an error."""

from typing import assert_type

import pytest

from latent_jax import methods
from latent_jax.config.evaluation import Evaluation
from latent_jax.config.training import Config
from latent_jax.methods.imagine import ImagineConfig
from latent_jax.methods.pretrain import PretrainConfig
from latent_jax.methods.sft import SftConfig


def test_the_sections_of_pretraining_are_known() -> None:
    config = PretrainConfig()
    assert isinstance(assert_type(config.loss.similarity, str), str)
    assert isinstance(assert_type(config.loss.similarity_weight, float), float)
    assert isinstance(assert_type(config.latent.grid, int), int)
    assert assert_type(config.loss.similarity_schedule, tuple[tuple[float, float], ...]) == ()


def test_a_misspelt_setting_is_an_error() -> None:
    with pytest.raises(AttributeError):
        _ = PretrainConfig().loss.similarty  # type: ignore[attr-defined]
    with pytest.raises(AttributeError):
        _ = PretrainConfig().train.batch_sise  # type: ignore[attr-defined]
    with pytest.raises(AttributeError):
        _ = Evaluation().evaluate.scorrer  # type: ignore[attr-defined]


def test_a_section_of_another_method_is_an_error() -> None:
    with pytest.raises(AttributeError):
        _ = SftConfig().latent  # type: ignore[attr-defined]
    with pytest.raises(AttributeError):
        _ = PretrainConfig().chat  # type: ignore[attr-defined]
    with pytest.raises(AttributeError):
        _ = Config().loss  # type: ignore[attr-defined]


def test_a_method_extends_another_with_sections_of_its_own() -> None:
    config = ImagineConfig()
    assert isinstance(assert_type(config.latent.grid, int), int)
    assert isinstance(assert_type(config.chat.questions, int), int)
    as_sft: SftConfig = config
    assert as_sft.loss.next_token_weight == 1.0
    wrong: PretrainConfig = config  # type: ignore[assignment]
    assert not isinstance(wrong, PretrainConfig)


def test_an_evaluation_is_one_class() -> None:
    assert assert_type(Evaluation().evaluate.imagine, bool | None) is None
    assert isinstance(assert_type(Evaluation().data.max_bad, float), float)


def test_a_method_knows_the_class_of_its_config() -> None:
    assert assert_type(methods.find("pretrain").config, type[Config]) is PretrainConfig
