"""Signals: the first asks, the second ends; the handlers before come back."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from latent_jax.errors import Stopped
from latent_jax.runtime import preemption


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_a_flag_that_the_loop_polls(number):
    before = signal.getsignal(number)
    with preemption.watch() as preempted:
        assert not preempted()
        os.kill(os.getpid(), number)
        assert preempted()
    assert signal.getsignal(number) is before


def test_handlers_come_back_after_an_error():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), preemption.watch():
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_second_signal_ends_the_process_at_once():
    code = (
        "import time; from latent_jax.runtime import preemption\n"
        "with preemption.watch() as preempted:\n"
        "    print('ready', flush=True)\n"
        "    while not preempted(): time.sleep(0.01)\n"
        "    print('asked', flush=True)\n"
        "    time.sleep(60)\n"
    )
    pipe = subprocess.PIPE
    child = subprocess.Popen([sys.executable, "-c", code], stdout=pipe, stderr=pipe, text=True)
    assert child.stdout.readline() == "ready\n"
    child.terminate()
    assert child.stdout.readline() == "asked\n"
    child.terminate()
    assert child.wait(timeout=10) == 128 + signal.SIGTERM
    assert child.stderr.read().strip().startswith("SIGTERM: saving a checkpoint")


def test_another_thread_listens_to_nothing():
    answers = []

    def work():
        with preemption.watch() as preempted:
            answers.append(preempted())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert answers == [False]


def test_once_all_is_saved_a_signal_ends_the_run_where_it_is(capfd):
    with pytest.raises(Stopped) as ended, preemption.watch() as asked:
        asked.at_once("the report")
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("went on")
    assert ended.value.code == 128 + signal.SIGTERM
    assert capfd.readouterr().err == "\nSIGTERM: stopped during the report; the same command goes on from there\n"


def test_a_signal_that_came_before_counts_when_all_is_saved(capfd):
    with pytest.raises(Stopped), preemption.watch("finishing this") as asked:
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked() and asked.number == signal.SIGTERM
        asked.at_once("the export")
    assert capfd.readouterr().err.startswith("\nSIGTERM: finishing this; again to stop at once\n")


def test_a_library_that_turns_the_stop_into_an_error_does_not_hide_it():
    with pytest.raises(Stopped) as ended, preemption.watch() as asked:
        asked.at_once("the report")
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except SystemExit:
            raise RuntimeError("INTERNAL: callback failed") from None
    assert ended.value.code == 128 + signal.SIGTERM
