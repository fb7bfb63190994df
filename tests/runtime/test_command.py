"""How commands end: one line and a status, whatever ended them."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import latent_jax
from latent_jax.errors import UserError
from latent_jax.runtime.command import Parser, command


@command
def _raise(problem):
    raise problem


@pytest.mark.parametrize(
    "problem, line",
    [
        (UserError("data.json: line 3:\n  no JSON"), "error: data.json: line 3: no JSON"),
        (OSError(28, "No space left on device", "runs/a"), "error: runs/a: No space left on device"),
        # names that a file made up, which a terminal would obey
        (UserError("a\x1b[2J\x07\u202e.json: no JSON"), "error: a\\x1b[2J\\x07\\u202e.json: no JSON"),
        (OSError(28, "No space left on device", "a\nb\x1b"), "error: a b\\x1b: No space left on device"),
        (RuntimeError("RESOURCE_EXHAUSTED: 9 TiB"), "error: not enough memory: RESOURCE_EXHAUSTED: 9 TiB"),
        # A copy: what is full is where it goes.
        (OSError(28, "No space left on device", "model/a", None, "runs/a"), "error: runs/a: No space left on device"),
        (
            FileExistsError(17, "File exists", "runs"),
            "error: runs: is there and not a directory; expected a directory, or nothing",
        ),
        (OSError("disk quota"), "error: disk quota"),
        (TimeoutError(), "error: TimeoutError"),
        # os.getcwd() where somebody removed the directory
        (FileNotFoundError(2, "No such file"), "error: no such file; was the current directory removed?"),
        (MemoryError("Unable to allocate 9 TiB"), "error: not enough memory: Unable to allocate 9 TiB"),
    ],
)
def test_bad_input_and_a_failing_disk_are_one_line_and_status_2(problem, line, capsys):
    with pytest.raises(SystemExit) as ended:
        _raise(problem)
    assert ended.value.code == 2 and capsys.readouterr().err == line + "\n"


def test_a_fault_of_ours_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        _raise(ZeroDivisionError())


def test_wrong_flags_are_one_line(capsys):
    @command
    def main():
        parser = Parser(prog="thing")
        parser.add_argument("--count", type=int, required=True)
        parser.parse_args(["--count=x"])

    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: argument --count: invalid int value: 'x'; see thing --help\n"


def _interrupted(body: str):
    program = f"""
import sys, time
from latent_jax.runtime.command import begin_command, command
begin_command()
@command
def main():
    {body}
print("ready", flush=True)
main()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    return process.returncode, said


@pytest.mark.parametrize(
    "body",
    [
        "time.sleep(20)",
        # a library that turns whatever it meets into an error of its own
        """
    try:
        time.sleep(20)
    except BaseException as problem:
        raise RuntimeError("INTERNAL: callback failed") from None
""",
        # a callback that cannot raise
        """
    class Callback:
        def __del__(self):
            time.sleep(20)
    Callback()
    time.sleep(20)
""",
    ],
    ids=["waiting", "turned into another error", "swallowed by a callback"],
)
def test_an_interrupt_is_one_line_and_130(body):
    assert _interrupted(body) == (130, "interrupted\n")


def test_an_interrupt_while_a_command_is_imported_is_one_line(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, time\n"
        "class Slow:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'ml_collections':\n"
        "            print('importing', flush=True)\n"
        "            time.sleep(20)\n"
        "sys.meta_path.insert(0, Slow())\n"
    )
    # A shell starts what runs in the background with the signal ignored, and its tests' children would inherit that.
    program = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "os.execv(sys.executable, [sys.executable, '-m', 'latent_jax.main'])"
    )
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": f"{tmp_path}:.", "PATH": "/usr/bin:/bin"},
    )
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (130, "interrupted\n")


def test_a_command_whose_standard_error_is_full_still_ends_as_it_would():
    program = "import sys\nfrom latent_jax.runtime.command import begin_command\nbegin_command()\n"
    program += "print('a', file=sys.stderr); sys.stderr.flush(); print('done')"
    with open("/dev/full", "w") as full:
        ended = subprocess.run([sys.executable, "-c", program], stderr=full, stdout=subprocess.PIPE, text=True)
    assert (ended.returncode, ended.stdout) == (0, "done\n")


def test_a_closed_standard_stream_is_no_file_of_the_run(tmp_path):
    program = (
        "import os, sys\nfrom latent_jax.runtime.command import begin_command\nbegin_command()\n"
        "with open(sys.argv[1], 'w') as file:\n"
        "    os.write(2, b'XLA warns')\n"
        "    print('a'); print('b', file=sys.stderr); assert not sys.stderr.isatty()\n"
        "    file.write('content')\n"
    )
    file = tmp_path / "file"
    shell = f'exec "{sys.executable}" -c "$0" "$1" <&- >&- 2>&-'
    assert subprocess.run(["sh", "-c", shell, program, file]).returncode == 0
    assert file.read_text() == "content"


def test_a_command_is_spared_what_libraries_say_of_themselves(monkeypatch):
    """XLA warns once for each buffer that is larger than a heap; transformers that torch is missing."""
    program = (
        "import latent_jax, jax, transformers.utils.logging as logging\n"
        "wide = jax.numpy.ones((300, 300))\n"
        "options = {'xla_multiheap_size_constraint_per_heap': 1024}\n"
        "jax.jit(lambda x: jax.numpy.tanh(x @ x) @ x @ x, compiler_options=options)(wide).block_until_ready()\n"
        "logging.get_logger('transformers').warning_advice('no torch')\n"
    )
    begun = "import latent_jax.runtime.command as c; c.begin_command()\n" + program
    for name in ("TF_CPP_MIN_LOG_LEVEL", "TRANSFORMERS_NO_ADVISORY_WARNINGS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "false")  # nothing is said of a program that is loaded
    said = [subprocess.run([sys.executable, "-c", p], capture_output=True, text=True).stderr for p in (program, begun)]
    assert "larger than the per-heap size limit" in said[0] and "no torch" in said[0]
    assert said[1] == ""


def test_links_in_a_loop_are_errors_of_the_file_system():
    """pathlib's resolve raises RuntimeError for them (until Python 3.13), which no caller expects of a path."""
    package = Path(latent_jax.__file__).parent
    used = [file.name for file in package.rglob("*.py") if re.search(r"(?<!__file__\))\.resolve\(\)", file.read_text())]
    assert not used, "os.path.realpath raises nothing, and opening what it gives tells"
