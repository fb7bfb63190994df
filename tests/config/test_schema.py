"""The schema, the command line's overrides, config.json and what a resumed run may change."""

import dataclasses
import json
import subprocess
import sys
import types

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_jax import methods
from latent_jax.config import schema
from latent_jax.config.evaluation import Evaluation
from latent_jax.config.fields import option
from latent_jax.config.training import Config, Train
from latent_jax.errors import UserError
from latent_jax.methods.contract import Method


@dataclasses.dataclass(frozen=True)
class Loss:
    similarity: str = option("cosine", "which", choices=("cosine", "l2"))
    similarity_weight: float = option(1.0, "weight", low=0)
    schedule: tuple[tuple[float, float], ...] = option((), "points")
    grid: tuple[int, int] = option((4, 4), "rows and columns", low=1)


@dataclasses.dataclass(frozen=True)
class FakeConfig(Config):
    loss: Loss = Loss()


def method_of(config: type) -> Method:
    """A method of this config alone."""
    nothing = lambda *_: None  # noqa: E731
    return Method(config, layout=nothing, coefficients=nothing, weights=nothing, loss=nothing)


@pytest.fixture(autouse=True)
def method():
    """A method module that exists for this file only."""
    module = types.ModuleType("latent_jax.methods.fake")
    module.METHOD = method_of(FakeConfig)
    sys.modules[module.__name__] = module
    methods.find.cache_clear()
    schema.schema.cache_clear()
    yield
    del sys.modules[module.__name__]


def changed(**dotted):
    config = schema.default("fake")
    for key, value in dotted.items():
        owner = config
        *parts, last = key.split("__")
        for part in parts:
            owner = owner[part]
        owner[last] = value
    return config


def test_defaults_resolve_to_a_frozen_hashable_config():
    config = schema.resolve(schema.default("fake"))
    assert (config.method, config.train.accumulate, config.loss.similarity) == ("fake", 1, "cosine")
    assert isinstance(config, Config)
    assert hash(config) == hash(schema.resolve(schema.default("fake")))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.train.steps = 3


def test_every_default_of_the_common_sections_is_allowed_and_documented():
    for key, (_, field, _) in schema.leaves(Config()).items():
        assert field.metadata["doc"], key


def test_an_integer_is_a_number_but_a_boolean_is_no_integer():
    assert schema.resolve(changed(train__learning_rate=1)).train.learning_rate == 1.0
    assert isinstance(schema.resolve(changed(train__learning_rate=1)).train.learning_rate, float)
    with pytest.raises(UserError, match=r"config\.train\.steps: got True, expected an integer in 1\.\.2147483647"):
        schema.resolve(changed(train__steps=True))


def test_lists_become_tuples():
    assert schema.resolve(changed(loss__schedule=[[0, 1], [0.5, 2]])).loss.schedule == ((0.0, 1.0), (0.5, 2.0))


@pytest.mark.parametrize(
    ("dotted", "message"),
    [
        ({"train__batch_size": "abc"}, r"config\.train\.batch_size: got 'abc', expected an integer in 1\.\.1048576"),
        ({"train__steps": 0}, r"config\.train\.steps: got 0, expected an integer in 1\.\.2147483647"),
        ({"train__learning_rate": float("nan")}, r"config\.train\.learning_rate: got nan, expected a number >= 0"),
        ({"data__replay": 1.5}, r"config\.data\.replay: got 1.5, expected a number in 0\.\.1"),
        ({"train__epsilon": 0}, r"config\.train\.epsilon: got 0.0, expected a number > 0"),
        ({"log__tensorboard": 1}, r"config\.log\.tensorboard: got 1, expected true or false"),
        ({"loss__similarity": "cosin"}, r"got 'cosin', expected one of cosine, l2; did you mean 'cosine'\?"),
        ({"loss__grid": (4, 0)}, r"config\.loss\.grid: got \(4, 0\), expected \(an integer, an integer\) >= 1"),
        ({"loss__grid": (4,)}, r"config\.loss\.grid: got \(4,\)"),
        ({"train__batch_sise": 3}, r"config\.train\.batch_sise: no such key; did you mean 'batch_size'\?"),
        ({"trian": 3}, r"config\.trian: no such key; did you mean 'train'\?"),
        ({"train": 3}, r"config\.train: got 3, expected a section with steps, batch_size"),
        ({"method": "nonesuch"}, r"config\.method: got 'nonesuch', expected one of "),
    ],
)
def test_a_wrong_value_is_one_line_that_names_the_key(dotted, message):
    with pytest.raises(UserError, match=message) as raised:
        schema.resolve(changed(**dotted))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("3", "train.steps", 3),
        ("1e-3", "train.learning_rate", 1e-3),
        ("2", "train.learning_rate", 2.0),
        ("false", "log.progress", False),
        ("qwen", "model.path", "qwen"),
        ("1", "model.path", "1"),
        ("((0, 1), (1, 0))", "loss.schedule", ((0.0, 1.0), (1.0, 0.0))),
        ("2,3", "loss.grid", (2, 3)),
    ],
)
def test_override_reads_text_as_the_schemas_type(text, key, value):
    config = schema.default("fake")
    schema.override(config, [(key, text)])
    assert schema.leaves(schema.resolve(config))[key][0] == value


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("train.batch_sise", "3", r"config\.train\.batch_sise: no such key; did you mean 'batch_size'\?"),
        ("train.steps", "abc", r"config\.train\.steps: got 'abc', expected an integer in 1\.\.2147483647"),
        ("train.steps", "1.5", r"config\.train\.steps: got 1\.5, expected an integer in 1\.\.2147483647"),
        ("train.steps", "(" * 10_000, r"config\.train\.steps: got '\(+\.\.\., expected an integer in 1\.\.2147483647"),
        ("train.steps", "10**99", r"config\.train\.steps: got '10\*\*99', expected an integer in 1\.\.2147483647"),
        ("train.steps.more", "1", r"config\.train\.steps\.more: 'steps' is a single value"),
        ("train", "1", r"config\.train: is a section; set one of steps, batch_size"),
        ("method", "sft", r"config\.method: a config file fixes its method \('fake'\)"),
    ],
)
def test_override_speaks_the_schemas_words(key, text, message):
    with pytest.raises(UserError, match=message):
        schema.override(schema.default("fake"), [(key, text)])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 10**6), st.floats(0, 1, width=32, allow_subnormal=False), st.booleans(), st.text(max_size=20))
def test_config_json_comes_back_equal(tmp_path_factory, steps, replay, progress, path):
    dotted = dict(train__steps=steps, data__replay=replay, log__progress=progress, model__path=path)
    config, file = schema.resolve(changed(**dotted, loss__grid=(2, 9))), tmp_path_factory.mktemp("c") / "config.json"
    schema.write(config, file, {"budgets": {"rows": 2}})
    assert schema.read(file) == (config, {"budgets": {"rows": 2}})


def test_config_json_holds_settings_versions_and_commit(tmp_path):
    schema.write(schema.resolve(schema.default("fake")), tmp_path / "config.json")
    found = json.loads((tmp_path / "config.json").read_text())
    assert found["train"]["steps"] == Train().steps
    assert found["versions"]["jax"] and "git_commit" in found
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_broken_config_json_names_file_and_key(tmp_path):
    file = tmp_path / "config.json"
    with pytest.raises(UserError, match=f"{file}: no such file"):
        schema.read(file)
    file.write_text("{")
    with pytest.raises(UserError, match=f"{file}: expected the config.json of a run, but it cannot"):
        schema.read(file)
    file.write_text('{"method": "fake", "train": {"steps": "x"}}')
    with pytest.raises(UserError, match=f"{file}: config.train.steps: got 'x'"):
        schema.read(file)


def test_a_config_json_that_is_not_what_was_written_is_refused(tmp_path):
    file = tmp_path / "config.json"
    schema.write(schema.resolve(schema.default("fake")), file, {"budgets": {"rows": 4}})
    whole = file.read_text()
    assert schema.read(file)[1] == {"budgets": {"rows": 4}}
    file.write_text(whole.replace('"rows": 4', '"rows": 5'))
    with pytest.raises(UserError, match=f"{file}: is not what the run wrote"):
        schema.read(file)
    before = json.loads(whole)
    del before["checksum"]  # as earlier versions wrote it
    file.write_text(json.dumps(before))
    assert schema.read(file)[1] == {"budgets": {"rows": 4}}


def test_resume_refuses_every_key_that_changes_numbers():
    old = schema.resolve(schema.default("fake"))
    new = changed(train__learning_rate=1e-5, loss__similarity="l2", log__every=7, data__threads=9)
    with pytest.raises(UserError) as raised:
        schema.check_resume(old, schema.resolve(new))
    named = "config.train.learning_rate (0.0002 -> 1e-05), config.loss.similarity ('cosine' -> 'l2');"
    assert named in str(raised.value)
    assert "log" not in str(raised.value) and "threads" not in str(raised.value)


def test_an_evaluation_goes_on_with_the_settings_that_it_began_with():
    assert schema.check_resume(Evaluation(), Evaluation()) == []


def test_resume_allows_what_trains_nothing_and_says_what_more_steps_do():
    old = schema.resolve(schema.default("fake"))
    assert (
        schema.check_resume(old, schema.resolve(changed(log__every=5, evaluate__examples=3, checkpoint__keep=1))) == []
    )
    assert "cosine schedule" in schema.check_resume(old, schema.resolve(changed(train__steps=2000)))[0]
    # The warm-up is a share of the steps too, and so are a loss's points.
    constant = {"train__schedule": "constant"}
    old = schema.resolve(changed(**constant))
    (line,) = schema.check_resume(old, schema.resolve(changed(**constant, train__steps=2000)))
    assert line.startswith("train.steps changes from 1000 to 2000: the warm-up is stretched to it")
    constant["train__warmup"] = 0.0
    old = schema.resolve(changed(**constant))
    assert schema.check_resume(old, schema.resolve(changed(**constant, train__steps=2000))) == []


@dataclasses.dataclass(frozen=True)
class Taken(Config):
    train: Loss = Loss()


@dataclasses.dataclass(frozen=True)
class Reserved(Config):
    versions: Loss = Loss()


@dataclasses.dataclass(frozen=True)
class Loose(Config):
    strength: float = option(1.0, "an option outside of any section")


class Undecorated(Config):
    loss: Loss = Loss()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Taken, r"method 'fake': sections \['train'\] are taken by the common config"),
        (Reserved, r"sections \['versions'\] are taken"),
        (Loose, "strength is .*float.*, expected a section: a frozen dataclass of options"),
        (Undecorated, r"Undecorated is not a dataclass, expected @dataclasses\.dataclass\(frozen=True\) before it"),
        (Loss, "config is .*Loss.*, expected a frozen dataclass that extends config.training.Config"),
        ({"loss": Loss}, "config is .*, expected a frozen dataclass that extends config.training.Config"),
    ],
)
def test_a_class_that_is_not_a_methods_config_is_refused(config, message):
    made = method_of(FakeConfig)
    object.__setattr__(made, "config", config)  # past the annotations, which only tests check
    sys.modules["latent_jax.methods.fake"].METHOD = made
    methods.find.cache_clear()
    schema.schema.cache_clear()
    with pytest.raises(UserError, match=message):  # one line, wherever a method of one's own is asked for
        schema.schema("fake")
    methods.find.cache_clear()
    schema.schema.cache_clear()


def test_the_keys_of_every_method_stand_in_the_order_in_which_they_always_stood():
    common = ["job", "method", "seed", "model", "data", "train", "checkpoint", "mesh", "hosts", "evaluate", "log"]
    own = {"pretrain": ["loss", "latent"], "sft": ["loss", "chat"], "imagine": ["loss", "chat", "latent"]}
    for name in methods.names():
        assert list(schema.to_dict(schema.schema(name)())) == common + own[name]
        assert list(methods.find(name).sections) == own[name]
        assert methods.find(name).config is schema.schema(name)


def test_fields_and_errors_import_without_jax():
    code = "import sys, latent_jax, latent_jax.config.fields, latent_jax.errors; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
