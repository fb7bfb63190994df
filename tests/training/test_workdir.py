"""What a run leaves behind, read back: config, structure, weights, and the latent statistics that `fit` measured."""

import jax
import numpy as np
import pytest
import torch

from latent_jax import train
from latent_jax.config import schema
from latent_jax.data.packing import BatchShape
from latent_jax.errors import UserError
from latent_jax.inference.vlm import VLM
from latent_jax.methods import pretrain
from latent_jax.models import hf_export
from latent_jax.runtime import sharding
from latent_jax.runtime.checkpoints import Checkpoints
from latent_jax.training import resume, workdir
from latent_jax.training.state import first_state, make_setup
from tests.reference import small

SIZE = dict(rows=2, tokens=64, patches=96, examples=4, slots=4, channels=588, image_patches=32)
BATCH_SHAPE = BatchShape(micro=1, groups=1, targets=1, **SIZE)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(workdir, config, its state): measured, and saved at steps 3 and 4."""
    directory = tmp_path_factory.mktemp("workdir")
    config = small.config()
    mesh = sharding.make_mesh(1, 1, 1, jax.devices()[:1])
    setup = make_setup(config, pretrain.METHOD, small.model_config(), mesh, {})
    data = [([small.record(index) for index in range(8)], 1.0)]
    state = train.fit(first_state(setup, ""), setup, data, small.processor(), BATCH_SHAPE)
    schema.write(config, directory / workdir.CONFIG, {"budgets": {"rows": 2}})
    hf_export.keep_origin(small.directory(), directory / workdir.ORIGIN)
    with Checkpoints(directory / workdir.CHECKPOINTS) as checkpoints:
        for step in (3, 4):
            text = {path: array * step for path, array in state.trainable.items()}
            resume.save(checkpoints, state._replace(step=jax.numpy.int32(step), trainable=text), {"position": 7}, {})
        checkpoints.wait()
        restored, position, _, _ = resume.restore(checkpoints, setup, directory)
    assert position == {"position": 7}
    return directory, config, state, restored


def test_the_statistics_are_of_the_records_that_training_takes(made):
    _, config, state, _ = made
    setup = make_setup(
        config, pretrain.METHOD, small.model_config(), sharding.make_mesh(1, 1, 1, jax.devices()[:1]), {}
    )
    records = [small.record(index) for index in range(8)]
    odd = [{**records[0], "captions": []}, {**records[1], "images": [b"no image"]}]

    def fitted(found):
        return train.fit(first_state(setup, ""), setup, [(found, 1.0)], small.processor(), BATCH_SHAPE).frozen[
            "head.mean"
        ]

    np.testing.assert_array_equal(fitted([odd[0], *records[2:], odd[1]]), fitted(records[2:]))
    with pytest.raises(UserError, match="no usable record: record 'r0': has no caption; expected"):
        fitted(odd[:1])


def test_a_run_is_read_back(made):
    directory, config, _, _ = made
    run = workdir.Run.of(directory)
    assert run.config == config and run.measured == {"budgets": {"rows": 2}}
    assert run.model_config.text == small.model_config().text
    assert run.origin == directory / "hf_files" and (run.origin / "tokenizer.json").is_file()
    assert workdir.is_workdir(directory) and not workdir.is_workdir(small.directory())


def test_weights_of_the_newest_step_or_of_any(made):
    directory, _, state, restored = made
    run = workdir.Run.of(directory)
    for step, found in ((4, run.arrays()), (3, run.arrays(3))):
        assert found.keys() == run.structure.variables.keys()
        for path, array in {**state.frozen, **{p: a * step for p, a in state.trainable.items()}}.items():
            np.testing.assert_array_equal(found[path], array, err_msg=path)
    assert int(restored.step) == 4
    jax.tree.map(np.testing.assert_array_equal, restored.opt_state, state.opt_state)
    np.testing.assert_array_equal(restored.trainable["head.fc1"], state.trainable["head.fc1"] * 4)
    vlm, head = workdir.split(run.arrays())
    assert len(vlm) + len(head) == len(run.structure.variables) and "text.embed" in vlm and "slots" in head


def test_statistics_are_those_of_the_pooled_targets(made):
    _, config, state, _ = made
    structure = workdir.Run.of(made[0]).structure
    facade = VLM(structure.build({**state.trainable, **state.frozen}), small.processor(), None, (), "small")
    pooled = []
    for index in range(8):
        image = facade.encode_image(small.record(index)["images"][0])
        rows, columns = (side // 2 for side in small.GRIDS[index % len(small.GRIDS)])
        cells = torch.tensor(image, dtype=torch.float64).reshape(rows, columns, -1).permute(2, 0, 1)
        pooled.append(torch.nn.functional.adaptive_avg_pool2d(cells[None], config.latent.grid)[0].flatten(1).T)
    z = torch.cat(pooled).numpy()
    np.testing.assert_allclose(state.frozen["head.mean"], z.mean(0), atol=1e-5)
    rms = np.sqrt(((z - z.mean(0)) ** 2).mean())
    np.testing.assert_allclose(state.frozen["head.scale"], np.full(z.shape[1], rms), rtol=1e-4)


def test_what_is_no_workdir_is_named(tmp_path, made):
    with pytest.raises(UserError, match=r"config\.json: no such file; expected the config\.json of a run"):
        workdir.Run.of(tmp_path)
    directory = made[0]
    with pytest.raises(UserError, match="no checkpoint of step 5; there are 3, 4"):
        workdir.Run.of(directory).arrays(5)
