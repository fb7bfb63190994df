"""Chat templates that would not end, or not fit, are refused in seconds; those that end pass."""

import pytest

from latent_jax.data import templates
from latent_jax.data.chat import Processor
from latent_jax.errors import UserError
from tests.data import tiny_processor

LOOP = (
    "{% for i in range(9999) %}{% for j in range(9999) %}{% for k in range(9999) %}{% endfor %}{% endfor %}{% endfor %}"
)
HOSTILE = {
    "loops": (LOOP, "does not end"),
    "macro": (
        "{% macro f(n) %}{% for i in range(9) %}{{ f(n + 1) if n < 40 }}{% endfor %}{% endmacro %}{{ f(0) }}",
        "end",
    ),
    "power folded when compiled": ("{{ 9 ** (9 ** 9) % 7 }}", "does not end"),
    "product": ("{{ 'x' * 10 ** 10 }}", "writes over|takes over"),
    "width": ("{{ '%999999999d' % 1 }}", "writes over|takes over"),
    "output": ("{% for i in range(99999) %}{{ 'long words' * 99 }}{% endfor %}", "writes over"),
}


@pytest.mark.slow
@pytest.mark.parametrize("template, fault", HOSTILE.values(), ids=HOSTILE)
def test_what_does_not_end_is_refused(template, fault):
    with pytest.raises(UserError, match=fault):
        templates.check_ends(template)


def test_a_template_that_writes_without_end_is_refused():
    with pytest.raises(UserError, match="writes over"):
        templates.check_ends("{% for i in range(99999) %}{{ 'long words' * 98 }}{% endfor %}")


def test_a_template_that_ends_passes():
    templates.check_ends(tiny_processor.TEMPLATE)
    templates.check_ends("{% generation %}{{ messages[0]['content'] }}{% endgeneration %}{% break %}")


@pytest.mark.parametrize(
    "template",
    [
        "{% for x in %}",
        "{{ messages.nothing.more }}",
        "{{ 1 / 0 }}",
        "{{ raise_exception('no') }}",
    ],
)
def test_a_template_that_cannot_be_rendered_is_one_line(tmp_path, template):
    with pytest.raises(UserError, match="the chat template cannot be rendered") as caught:
        Processor.from_directory(tiny_processor.write(tmp_path, template=template))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("template", ["{{ ''.__class__ }}", "hello"])
def test_a_template_that_drops_what_is_said_is_refused(tmp_path, template):
    with pytest.raises(UserError, match="does not show what a user says"):
        Processor.from_directory(tiny_processor.write(tmp_path, template=template))
