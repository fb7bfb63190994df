"""Progress: a bar on a terminal, few lines in a file, silence when told."""

import io

from latent_jax.runtime import progress
from latent_jax.runtime.progress import Progress

VALUES = {"loss/total": 1.23456, "tokens_per_second": 12345.6, "grad_norm": 1.0}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run(stream, steps, **options):
    with Progress(steps, stream=stream, **options) as shown:
        for step in range(1 + options.get("first", 0), steps + 1):
            shown.update(step, VALUES)
    return stream.getvalue()


def test_a_file_gets_the_first_and_the_last_step():
    lines = run(io.StringIO(), 1000).splitlines()
    assert [line.split()[1] for line in lines] == ["1/1000", "1000/1000"]
    assert "loss 1.235  12,346 tokens/s" in lines[0]


def test_a_file_gets_a_line_when_time_has_passed(monkeypatch):
    clock = iter(range(0, 10_000, 6))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    lines = run(io.StringIO(), 10).splitlines()
    assert [line.split()[1] for line in lines] == ["1/10", "4/10", "7/10", "10/10"]
    # Six seconds a step: after the fourth there are six to go.
    assert lines[1].endswith("left 00:36")


def test_neither_restored_steps_nor_what_is_compiled_before_the_first_count_as_steps(monkeypatch):
    clock = iter([1000.0, 1020.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    stream = io.StringIO()
    shown = Progress(100, first=90, stream=stream)
    shown.update(91, VALUES)
    shown.update(93, VALUES)
    first, second = stream.getvalue().splitlines()
    assert "left" not in first and second.endswith("left 01:10")


def test_a_terminal_gets_a_bar():
    shown = run(Terminal(), 5)
    assert "5/5" in shown and "loss 1.235" in shown and "\r" in shown


def test_disabled_is_silent_but_still_says_what_must_be_said():
    stream = io.StringIO()
    shown = Progress(3, enabled=False, stream=stream)
    shown.update(1, VALUES)
    assert stream.getvalue() == ""
    shown.say("saved")
    assert stream.getvalue() == "saved\n"


def test_after_the_last_step_the_bar_is_left_alone():
    stream = Terminal()
    with Progress(2, stream=stream) as shown:
        shown.update(1, VALUES)
        shown.update(2, VALUES)
        done = stream.getvalue()
        assert done.endswith("\n") and "2/2" in done
        shown.say("HF checkpoint")
    assert stream.getvalue() == done + "HF checkpoint\n"


def test_a_title_stands_before_the_unit_in_a_file_and_before_the_bar():
    options = {"unit": "example", "title": "report"}
    assert run(io.StringIO(), 1, **options).startswith("report: example 1/1 ")
    assert "report: " in run(Terminal(), 1, **options)
