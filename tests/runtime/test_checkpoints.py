"""Checkpoints: a round trip on any mesh, partial reads, clear errors, and nothing half-written after a kill."""

import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from latent_jax.errors import UserError
from latent_jax.runtime import files
from latent_jax.runtime.checkpoints import Checkpoints, Damaged


def sharded(count):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:count]), ("fsdp",))
    return NamedSharding(mesh, PartitionSpec("fsdp"))


def make_state():
    weights = {
        "matrix": jax.device_put(jnp.arange(64, dtype=jnp.bfloat16).reshape(8, 8), sharded(8)),
        "blocks": [jax.random.normal(jax.random.key(0), (3,)), jnp.int32(7)],
    }
    return {"params": weights, "optimizer": optax.adamw(1e-3).init(weights)}


def abstract(state, sharding=None):
    struct = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding if x.ndim == 2 else x.sharding)
    return jax.tree.map(struct, state)


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right)):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


@pytest.fixture(scope="module")
def state():
    return make_state()


@pytest.fixture(scope="module")
def saved(tmp_path_factory, state):
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    with Checkpoints(directory, every=5, keep=2) as checkpoints:
        for step in (5, 10, 15):
            assert checkpoints.save(step, state, {"next": step}, {"fill": 0.5})
        assert not checkpoints.save(15, state, {"next": 99})
        checkpoints.wait()
    return directory


def test_layout_and_keep(saved):
    assert sorted(path.name for path in saved.iterdir()) == ["10", "15"]
    assert {"params", "optimizer", "iterator", "extra"} <= {path.name for path in (saved / "15").iterdir()}


def test_what_is_no_directory_is_refused_by_name(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("file", "dangling"):
        with pytest.raises(UserError, match=f"{name}: not a directory; expected a run's checkpoints"):
            Checkpoints(tmp_path / name)


def test_due():
    assert [step for step in range(1, 12) if Checkpoints("unused", every=5, read_only=True).due(step)] == [5, 10]


@pytest.mark.parametrize("devices", [8, 2])
def test_restore_is_bit_equal_on_another_mesh(saved, state, devices):
    with Checkpoints(saved, read_only=True) as checkpoints:
        restored, iterator, extra = checkpoints.restore(None, abstract(state, sharded(devices)))
    assert_same(restored, state)
    assert restored["params"]["matrix"].sharding == sharded(devices)
    assert (iterator, extra) == ({"next": 15}, {"fill": 0.5})


def test_parameters_alone_as_numpy(saved, state):
    with Checkpoints(saved, read_only=True) as checkpoints:
        params = checkpoints.restore_item(10, "params")
        assert checkpoints.extra(10) == {"fill": 0.5}
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params))
    assert_same(params, state["params"])


def test_what_was_saved_before_numbers_were_checked_is_named(tmp_path):
    state = {"params": {"w": jnp.array([1.0, jnp.nan])}}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        checkpoints.wait()
        with pytest.raises(Damaged, match=r"1/params: w was not finite \(NaN or infinite\) when it was saved"):
            checkpoints.restore(1, abstract(state))
        assert np.isnan(checkpoints.restore_item(1, "params")["w"][1])  # to look at, or to convert


def test_what_another_step_saved_is_damage(saved, state, tmp_path):
    """Each part is whole by itself: nothing but the step and the parts' sums tells."""
    iterator, step = shutil.copytree(saved, tmp_path / "iterator"), shutil.copytree(saved, tmp_path / "step")
    shutil.copy(iterator / "10" / "iterator" / "metadata", iterator / "15" / "iterator" / "metadata")
    with Checkpoints(iterator) as checkpoints:
        with pytest.raises(Damaged, match="15/iterator: is of another checkpoint than 15"):
            checkpoints.restore(15, abstract(state))
        assert checkpoints.restore(10, abstract(state))[1] == {"next": 10}
    shutil.rmtree(step / "15")
    (step / "10").rename(step / "15")
    with Checkpoints(step) as checkpoints, pytest.raises(Damaged, match="metadata: was saved as step 10, not 15"):
        checkpoints.restore(15, abstract(state))


def test_what_another_run_saved_is_damage_and_what_nobody_named_is_read(tmp_path, state):
    with Checkpoints(tmp_path, run="one") as checkpoints:
        checkpoints.save(1, state, {"next": 1})
    told = pytest.raises(Damaged, match="1/extra/metadata: was saved by another run than the one that config.json")
    with Checkpoints(tmp_path, run="another") as checkpoints, told:
        checkpoints.restore(1, abstract(state))
    for name in ("one", None):
        with Checkpoints(tmp_path, run=name) as checkpoints:
            assert checkpoints.restore(1, abstract(state))[1] == {"next": 1}
    with Checkpoints(tmp_path / "unnamed") as checkpoints:
        checkpoints.save(1, state, {"next": 1})
    with Checkpoints(tmp_path / "unnamed", run="one") as checkpoints:  # begun by an earlier version
        assert checkpoints.restore(1, abstract(state))[1] == {"next": 1}


@pytest.mark.parametrize("make", [lambda path: path.symlink_to("nowhere"), lambda path: path.write_text("")])
def test_a_steps_name_on_something_else_is_told_before_anything_is_saved(make, tmp_path):
    make(tmp_path / "4")
    with pytest.raises(UserError, match="4: not a directory; expected a checkpoint of that step, or nothing"):
        Checkpoints(tmp_path)


def test_what_was_saved_before_the_parts_were_bound_is_read(tmp_path, state, monkeypatch):
    with monkeypatch.context() as earlier:
        sealed = files.sealed
        drop = lambda document: {name: value for name, value in document.items() if name != "saved_as"}
        earlier.setattr(files, "sealed", lambda document: sealed(drop(document)))
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(3, state, {"next": 3}, {"fill": 1})
    with Checkpoints(tmp_path) as checkpoints:
        assert "saved_as" not in (tmp_path / "3" / "extra" / "metadata").read_text()
        assert checkpoints.restore(3, abstract(state))[1:] == ({"next": 3}, {"fill": 1})


@pytest.mark.parametrize(("number", "reason"), [(27, "File too large"), (107, "Transport endpoint is not connected")])
def test_whatever_the_system_refuses_to_tensorstore_is_one_line(number, reason, tmp_path):
    """It is no OSError, and of a thread: the run ended with twenty tracebacks."""
    told = pytest.raises(UserError, match=f"cannot be written: {reason}$")
    with Checkpoints(tmp_path) as checkpoints, told, checkpoints._writing():
        raise ValueError(f"OUT_OF_RANGE: Failed to write 8 bytes to file 3: words [os_error_code='{number}']")


def test_reading_needs_no_writing(saved, tmp_path):
    with pytest.raises(UserError, match="no checkpoint; expected a directory STEP/"):
        Checkpoints(tmp_path / "nowhere", read_only=True).restore_item(None, "params")
    assert not (tmp_path / "nowhere").exists()


def test_errors_name_what_is_wrong(saved, state):
    with Checkpoints(saved, read_only=True) as checkpoints:
        with pytest.raises(UserError, match="no checkpoint of step 11; there are 10, 15"):
            checkpoints.restore(11, abstract(state))
        with pytest.raises(UserError, match=r"15/weights: no item 'weights'; the checkpoint holds .*params"):
            checkpoints.restore_item(None, "weights")
        wrong = {"matrix": jax.ShapeDtypeStruct((8, 4), jnp.bfloat16), "blocks": state["params"]["blocks"]}
        with pytest.raises(UserError, match=r"params\.matrix is \(8, 8\) in the checkpoint, expected \(8, 4\)"):
            checkpoints.restore_item(None, "params", wrong)
        with pytest.raises(UserError, match=r"params\.blocks\.0 is \(3,\) in the checkpoint, expected absent"):
            checkpoints.restore_item(None, "params", {"matrix": abstract(state)["params"]["matrix"]})


def test_the_state_may_be_donated_while_it_is_written(tmp_path):
    bump = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    state = {"params": {"w": jnp.zeros((512, 512))}}
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2, 3):
            state = bump(state)
            checkpoints.save(step, state, {})
        checkpoints.wait()
        assert [float(checkpoints.restore_item(step, "params")["w"].max()) for step in (1, 2, 3)] == [1, 2, 3]


WRITER = """
import sys, jax.numpy as jnp
from latent_jax.runtime.checkpoints import Checkpoints
checkpoints = Checkpoints(sys.argv[1], keep=2)
for step in range((checkpoints.latest() or 0) + 1, 10_000):
    checkpoints.save(step, {"params": [jnp.full((256, 256), float(step)) for _ in range(8)]}, {"next": step})
    print(step, flush=True)
"""


def test_a_kill_during_a_save_leaves_only_whole_steps(tmp_path):
    """Killed at several moments of its saves, a writer never leaves a latest step that cannot be read."""
    before = 0
    for delay in (0.0, 0.013, 0.031):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(4):
            assert writer.stdout.readline()
        time.sleep(delay)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        with Checkpoints(tmp_path, read_only=True) as checkpoints:
            step = checkpoints.latest()
            params = checkpoints.restore_item(step, "params")
            assert checkpoints.restore(step, {})[1] == {"next": step}
        assert step > before and all((leaf == step).all() for leaf in params)
        before = step
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(before + 1, {"params": [jnp.zeros(2)]}, {})
        checkpoints.wait()
    assert all(path.name.isdigit() for path in tmp_path.iterdir())


# A disk that answers late: what Orbax lists in a thread of its own comes after the program's last line.
ENDING = """
import sys, time
from pathlib import Path
from orbax.checkpoint._src.path import async_path
exists = async_path.exists
async def late(path):
    time.sleep(1)
    return await exists(path)
async_path.exists = late
from latent_jax.runtime.checkpoints import Checkpoints
import logging
logging.getLogger("absl").filters.clear()
checkpoints = Checkpoints(sys.argv[1])
if sys.argv[2] == "close":
    checkpoints.close()
print(sorted(path.name for path in Path(sys.argv[1]).iterdir()), checkpoints.steps())
"""


@pytest.mark.parametrize("end", ["close", "return"])
def test_a_program_that_saves_nothing_clears_what_a_kill_left_and_ends_in_silence(saved, tmp_path, end):
    directory = shutil.copytree(saved, tmp_path / "run")
    unfinished = directory / f"20{ocp.utils.TMP_DIR_SUFFIX}"
    shutil.copytree(directory / "15", unfinished)
    done = subprocess.run([sys.executable, "-c", ENDING, str(directory), end], capture_output=True, text=True)
    assert (done.stdout, done.stderr, done.returncode) == ("['10', '15'] [10, 15]\n", "", 0)
    assert not unfinished.exists()


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"params": {"x": jnp.ones(3)}}, {})
        checkpoints.wait()
        file = next(path for path in (tmp_path / "1" / "params").rglob("*") if path.parent.name == "d")
        file.unlink()
        os.mkfifo(file)
        with pytest.raises(Damaged, match=f"{file}: not a regular file"):
            checkpoints.restore_item(1, "params")


READER = """
import sys
from latent_jax.runtime.command import command
from latent_jax.runtime.checkpoints import Checkpoints
@command
def main():
    with Checkpoints(sys.argv[1], read_only=True) as checkpoints:
        checkpoints.restore_item(1, "params")
main()
"""


def test_an_array_that_cannot_be_read_is_one_line(tmp_path):
    """And nothing of the others, which Orbax was reading beside it and gave up."""
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"params": {str(i): jax.random.normal(jax.random.key(i), (64, 64)) for i in range(12)}}, {})
        checkpoints.wait()
    file = max((tmp_path / "1" / "params").rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    done = subprocess.run([sys.executable, "-c", READER, str(tmp_path)], capture_output=True, text=True, check=False)
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    assert lines[0].startswith(f"error: {tmp_path / '1' / 'params'}: cannot be read back")
    assert "TensorStore details" not in lines[0]


TOO_LARGE = """
import resource, sys
import jax.numpy as jnp
from latent_jax.runtime.command import command
from latent_jax.runtime.checkpoints import Checkpoints

@command
def main():
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, 2**14))
    with Checkpoints(sys.argv[1]) as checkpoints:
        checkpoints.save(1, {"params": [jnp.arange(2.0**14) * i for i in range(40)]}, {})
        checkpoints.wait()

main()
"""


def test_arrays_that_cannot_be_written_are_one_line(tmp_path):
    """TensorStore's threads told a loop that was gone, at length, of every array after the first."""
    command = [sys.executable, "-c", TOO_LARGE, str(tmp_path / "run")]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr == f"error: {tmp_path / 'run'}: a checkpoint cannot be written: File too large\n"
