"""metrics.jsonl: whole lines, cut to the restored step; TensorBoard events without TensorFlow."""

import json
import os
import signal
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_jax.errors import UserError
from latent_jax.runtime import metrics
from latent_jax.runtime.metrics import Metrics


def write(workdir, first, last, resume_step=0, **options):
    with Metrics(workdir, resume_step, tensorboard=False, **options) as log:
        for step in range(first, last + 1):
            log.write(step, {"loss/total": step / 2})


def steps(workdir):
    return [line["step"] for line in metrics.read(workdir / "metrics.jsonl")]


def test_a_line_is_there_as_soon_as_it_is_written(tmp_path):
    log = Metrics(tmp_path, tensorboard=False)
    log.write(1, {"loss/total": np.float32(0.1), "examples": 4, "grad_norm": jnp.float32(2)})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "step": 1, "loss/total": float(np.float32(0.1)), "examples": 4, "grad_norm": 2.0}  # fmt: skip
    log.close()


def test_what_is_not_finite_is_null(tmp_path):
    with Metrics(tmp_path, tensorboard=False) as log:
        log.write(1, {"loss/total": float("nan"), "grad_norm": np.float32("inf")})
    assert metrics.read(tmp_path / "metrics.jsonl") == [{"step": 1, "loss/total": None, "grad_norm": None}]


def test_resume_goes_on_after_the_restored_step(tmp_path):
    write(tmp_path, 1, 7)
    write(tmp_path, 6, 9, resume_step=5)
    assert steps(tmp_path) == list(range(1, 10))


def test_a_fresh_start_forgets_a_run_without_checkpoint(tmp_path):
    write(tmp_path, 1, 3)
    write(tmp_path, 1, 1)
    assert steps(tmp_path) == [1]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 6), st.integers(1, 60))
def test_a_file_cut_anywhere_resumes_to_whole_lines(tmp_path_factory, resume_step, cut):
    workdir = tmp_path_factory.mktemp("run")
    write(workdir, 1, 5)
    path = workdir / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    survived = [step for step in range(1, 1 + whole[:-cut].count(b"\n")) if step <= resume_step]
    write(workdir, 9, 9, resume_step=resume_step)
    assert steps(workdir) == [*survived, 9]


def test_a_broken_line_in_the_middle_is_an_error_that_names_it(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"stp": 2}\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: expected a JSON object with a 'step'"):
        Metrics(tmp_path, 3, tensorboard=False)


@pytest.mark.parametrize("line", ['{"step": null}', '{"step": "x"}', "[" * 100_000, "7", '{"step": 1e999}'])
def test_whatever_a_line_holds_it_is_named(line, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: expected a JSON object with a 'step'"):
        Metrics(tmp_path, 3, tensorboard=False)


def test_a_pipe_in_the_place_of_the_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match=r"metrics\.jsonl: not a regular file"):
        Metrics(tmp_path, tensorboard=False)


@pytest.mark.parametrize("file", ["metrics.jsonl", "events.out"])
def test_a_full_disk_names_the_file(file, tmp_path):
    code = (
        "import resource, signal, sys; from latent_jax.runtime.metrics import Metrics\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"log = Metrics({str(tmp_path)!r}, tensorboard={file != 'metrics.jsonl'})\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({10 if file == 'metrics.jsonl' else 60},) * 2)\n"
        "try:\n    with log: log.write(1, {'a': 0.25})\n"
        "except OSError as problem: print(problem.filename)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ended.stdout.startswith(str(tmp_path / file)), ended.stderr


def test_due_and_hosts_that_are_not_the_primary(tmp_path):
    with Metrics(tmp_path, every=3, tensorboard=False) as log:
        assert [step for step in range(1, 8) if log.due(step)] == [3, 6]
    with Metrics(tmp_path / "other", primary=False) as log:
        assert not log.due(3)
        log.write(1, {"loss/total": 1})
    assert not (tmp_path / "other").exists()


def test_tensorboard_is_written_beside_the_lines(tmp_path):
    with Metrics(tmp_path) as log:
        log.write(1, {"loss/total": 0.5, "loss/similarity": jnp.float32(0.25)})
    (path,) = tmp_path.glob("events.out.tfevents.*")
    assert b"loss/total" in path.read_bytes() and b"loss/similarity" in path.read_bytes()


def test_tensorflow_and_tensorboard_are_not_imported(tmp_path):
    code = (
        "import sys; from latent_jax.runtime.metrics import Metrics\n"
        f"Metrics({str(tmp_path)!r}).close()\n"
        "sys.exit(bool({'tensorflow', 'tensorboard', 'jax'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_a_kill_loses_no_written_step(tmp_path):
    code = (
        "import itertools, sys; from latent_jax.runtime.metrics import Metrics\n"
        f"log = Metrics({str(tmp_path)!r}, tensorboard=False)\n"
        "for step in itertools.count(1):\n"
        "    log.write(step, {'loss/total': step / 3})\n"
        "    print(step, flush=True)\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    for _ in range(50):
        said = int(writer.stdout.readline())
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert steps(tmp_path)[:said] == list(range(1, said + 1))


def test_lines_that_were_changed_since_a_checkpoint_are_told(tmp_path):
    with Metrics(tmp_path, tensorboard=False) as made:
        for step in (1, 2, 3):
            made.write(step, {"loss/total": 1.5})
            if step == 2:
                kept = made.checksum()
    with Metrics(tmp_path, 2, tensorboard=False, expected=kept) as again:
        assert again.checksum() == kept
        again.write(3, {"loss/total": 1.5})
    file = tmp_path / "metrics.jsonl"
    file.write_text(file.read_text().replace("1.5", "1.6", 1))
    with pytest.raises(UserError, match=f"{file}: its lines up to step 2 are not those that the run wrote"):
        Metrics(tmp_path, 2, tensorboard=False, expected=kept)
