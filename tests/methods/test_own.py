"""Faults of a method of one's own: each is one line that names the part of the method, the exception and the place."""

import dataclasses
import itertools
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from examples.own_method import METHOD as PAUSES
from latent_jax import methods
from latent_jax.config import schema
from latent_jax.errors import UserError
from latent_jax.methods.own import guarded
from latent_jax.models.parameters import Declare, Structure
from latent_jax.runtime import sharding
from latent_jax.training import finish
from latent_jax.training.state import check_frozen, first_state, make_setup
from latent_jax.training.step import check_loss
from tests.reference import small

BEGIN = """
import dataclasses
from examples.own_method import *
from examples.own_method import METHOD as PAUSES
from latent_jax.methods.contract import Method
"""
CONFIG = """
@dataclasses.dataclass({options})
class Mine:
    {setting}

@dataclasses.dataclass(frozen=True)
class MyConfig(PauseConfig):
    {section}: Mine = {value}

METHOD = dataclasses.replace(PAUSES, config=MyConfig)
"""
NUMBER = 'size: int = option(4, "a size", low=1)'
count = itertools.count()


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Writes a module and returns its dotted name."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(code: str) -> str:
        name = f"own_method_{next(count)}"  # an imported module stays imported
        (tmp_path / f"{name}.py").write_text(code)
        return name

    return write


def of_config(options="frozen=True", setting=NUMBER, section="mine", value="Mine()") -> str:
    return BEGIN + CONFIG.format(options=options, setting=setting, section=section, value=value)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("x = 1\nraise RuntimeError('two\\nlines')", r"cannot be imported: RuntimeError: two lines \(own_.*\.py:2\)$"),
        ("import sys\nsys.exit('no')", r"cannot be imported: SystemExit: no \(own_.*\.py:2\)$"),
        ("x = 1\ndef (:", r"cannot be imported: SyntaxError: invalid syntax \(own_.*\.py:2\)$"),
        ("import absent_of_all", "cannot be imported: No module named 'absent_of_all'$"),
        ("METHOD = 3", r"a METHOD; the METHOD of own_.* is 3, expected a Method\(\.\.\.\)$"),
        (BEGIN + "METHOD = Method", r"the METHOD of own_.* is <class .*Method'>, expected a Method"),
        (BEGIN + "METHOD = Method(config=PauseConfig)", r"TypeError: .*missing .* required .*\(own_.*\.py:6\)$"),
        (of_config(section="data"), r"sections \['data'\] are taken by the common config"),
        (of_config(setting="size: int = 4"), r"mine\.size is no option, expected NAME: TYPE = option\(DEFAULT, DOC\)"),
        (of_config(setting='size: dict = option(None, "?")'), r"mine\.size is no option, expected .* the type of int"),
        (
            of_config("unsafe_hash=True", value="dataclasses.field(default_factory=Mine)"),
            "section mine is not frozen, expected",
        ),
        (
            of_config(value="dataclasses.field(default_factory=lambda: Mine(1, 2))"),
            "has no default for every section: .*3 were given",
        ),
        (
            BEGIN + "METHOD = dataclasses.replace(PAUSES, head_settings=('pause.cuont',))",
            r"head_settings: 'pause\.cuont' is no setting of its config",
        ),
    ],
)
def test_a_module_that_is_no_method_is_one_line(code, message, written):
    with pytest.raises(UserError, match=rf"^config\.method: .*{message}"):
        schema.default(written(code))


def test_a_default_that_is_not_allowed_is_named(written):
    config = schema.default(written(of_config(setting='size: int = option(0, "a size", low=1)')))
    with pytest.raises(UserError, match=r"^config\.mine\.size: got 0, expected an integer >= 1"):
        schema.resolve(config)


def test_a_package_is_a_method(tmp_path, monkeypatch):
    (tmp_path / "own_package").mkdir()
    (tmp_path / "own_package" / "__init__.py").write_text(BEGIN + "METHOD = PAUSES")
    monkeypatch.syspath_prepend(tmp_path)
    assert schema.resolve(schema.default("own_package")).pause.count == 4


def test_what_its_functions_raise_names_part_and_place(written):
    code = (
        BEGIN + "METHOD = dataclasses.replace(PAUSES, room=lambda config: config.pause.cuont, passes=lambda c: '2',\n"
    )
    code += "  think=dataclasses.replace(PAUSES.think, shape=lambda config: {}[config.seed]), layout=lambda *a: a[9])\n"
    name = written(code)
    method, config = methods.find(name), schema.resolve(schema.default(name))
    with pytest.raises(UserError, match=rf"^config\.method: Method\.room of {name}: AttributeError: .*\({name}.py:6\)"):
        method.room(config)
    with pytest.raises(
        UserError, match=rf"^config\.method: Think\.shape of {name}: KeyError: 0 \({name}.py:7\)$"
    ) as told:
        method.think.shape(config)
    assert "KeyError" in "".join(traceback.format_exception(told.value.__cause__))
    with pytest.raises(UserError, match=rf"^config\.method: Method\.passes of {name} returned '2', expected int$"):
        method.passes(config)
    with pytest.raises(IndexError):  # the record is named where it is laid out
        method.layout({}, 0, config, None)


def test_what_is_no_fault_of_its_code_passes(written):
    raised = [UserError("as it is"), MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: 3 GiB")]
    errors = iter(raised)

    def room(config):
        raise next(errors)

    method = guarded(dataclasses.replace(PAUSES, room=room), pytest)
    for problem in raised:
        with pytest.raises(type(problem)) as found:
            method.room(None)
        assert found.value is problem


# ---------------------------------------------------------------- its loss


NUMBERS = {"next_token": 1.0}
PAIR = (jnp.float32(2), jnp.float32(4))


@pytest.mark.parametrize(
    ("found", "coefficients", "message"),
    [
        (({"mine": PAIR}, {}), NUMBERS, r"has the terms \['mine'\], its coefficients \['next_token'\], its weights"),
        (({"next_token": PAIR}, {}), {}, r"has the terms \['next_token'\], its coefficients \[\]"),
        (({"next_token": PAIR, "mine": PAIR}, {}), NUMBERS, r"has the terms \['mine', 'next_token'\]"),
        (PAIR[0], NUMBERS, r"is not \(\{term: \(sum, weight\)\}, \{metric: \(sum, weight\)\}\) with scalars"),
        (({"next_token": PAIR[0]}, {}), NUMBERS, "is not .* with scalars for sum and weight"),
        (({"next_token": PAIR}, {"share": (jnp.ones(3), PAIR[0])}), NUMBERS, "is not .* with scalars"),
    ],
)
def test_a_loss_that_is_not_as_its_weights_is_one_line(found, coefficients, message):
    with pytest.raises(UserError, match=rf"^config\.method: the loss of mine {message}"):
        check_loss(found, coefficients, NUMBERS, "mine")


def test_a_loss_with_the_terms_of_its_weights_is_taken():
    assert check_loss(({"next_token": PAIR}, {}), NUMBERS, NUMBERS, "mine") == ({"next_token": PAIR}, {})


# ---------------------------------------------------------------- its head


def setup_of(**parts):
    config = small.config("examples.own_method", data=dict(groups=1))
    mesh = sharding.make_mesh(1, 1, 1, jax.devices()[:1])
    return make_setup(config, dataclasses.replace(PAUSES, **parts), small.model_config(), mesh, {})


class Bare(nnx.Module):
    """`embeddings` as they should be, and one more."""

    def __init__(self, more, rngs):
        self.embeddings = Declare(dict(S=4, D=64), rngs, jnp.float32).constant("S D")
        self.more = more


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (lambda rngs: nnx.Param(jnp.ones(3)), "more of .* is not made by .*Declare, which says its axes"),
        (lambda rngs: nnx.Linear(2, 3, rngs=rngs), r"more\.(kernel|bias) of .* is not made by .*Declare"),
        (lambda rngs: nnx.Dropout(0.5, rngs=rngs), r"more\.rngs\S* of .* is a Rng\w+; expected weights and statistics"),
        (lambda rngs: Declare(dict(D=2), rngs, jnp.int32).constant("D"), "more of .* is int32, expected floats"),
        (lambda rngs: Declare(dict(D=0), rngs, jnp.float32).constant("D"), r"more of .* has shape \(0,\), expected at"),
    ],
)
def test_a_head_of_anything_but_declared_weights_is_one_line(more, message):
    with pytest.raises(UserError, match=rf"^config\.method: head\.{message}"):
        setup_of(build_head=lambda model, config, rngs: Bare(more(rngs), rngs))


def test_a_head_may_have_a_list_of_weights():
    def build(model, config, rngs):
        declare = Declare(dict(D=2), rngs, jnp.float32)
        return Bare(nnx.List([declare.constant("D", value) for value in (1.0, 2.0)]), rngs)

    structure = setup_of(build_head=build).structure
    assert {"head.more.0", "head.more.1"} <= structure.variables.keys()
    head = build(None, None, nnx.Rngs(0))
    again = Structure.of(head).build(Structure.of(head).arrays(head))
    np.testing.assert_array_equal(again.more[1][...], [2.0, 2.0])


class Loads:
    def __init__(self, found):
        self.found = found

    def dtype(self, stored):
        return None

    def check(self, path, like):
        pass

    def __call__(self, path, like, model):
        if isinstance(self.found, Exception):
            raise self.found
        return self.found


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (jnp.zeros(1), r" gave float32 \(1,\), expected float32 \(4, 64\)"),
        (jnp.zeros((4, 64), jnp.int32), r" gave int32 \(4, 64\), expected float32"),
        (OSError("disk gone"), ": disk gone$"),
    ],
)
def test_a_frozen_array_that_is_not_as_declared_is_one_line(found, message):
    setup = setup_of(frozen=lambda config: {"head.embeddings": Loads(found)})
    with pytest.raises(UserError, match=rf"^config\.method: the loader of head\.embeddings{message}"):
        first_state(setup, "")


def test_a_frozen_array_of_the_model_s_own_is_one_line():
    method = dataclasses.replace(PAUSES, frozen=lambda config: {"vlm.text.embed": Loads(None)})
    with pytest.raises(UserError, match=r"^config\.method: Method\.frozen of .*: 'vlm\.text\.embed' is no path"):
        check_frozen(small.config("examples.own_method"), method, small.model_config())


def test_a_report_that_is_not_there_is_one_line(tmp_path):
    method = dataclasses.replace(PAUSES, report="absent_of_all.report")
    with pytest.raises(UserError, match=r"^config\.method: Method\.report of examples\.own_method: No module named"):
        finish.look_ahead(small.config("examples.own_method"), method, tmp_path)
