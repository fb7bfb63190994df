"""How full the batches of the shipped configs are: batch_shape from a sample of lengths, judged on other examples."""

import dataclasses
import runpy
from pathlib import Path

import numpy as np
import pytest

from latent_jax import methods
from latent_jax.assets import TINY_VL
from latent_jax.config import schema
from latent_jax.data import batch_shapes, packing, pipeline, sources
from latent_jax.data.builders.build import build_scenes
from latent_jax.data.chat import Processor
from latent_jax.data.images import smart_resize
from latent_jax.data.layout import Room
from latent_jax.data.packing import Size

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SAMPLE, COUNT = 256, 1024


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    directory = tmp_path_factory.mktemp("scenes") / "prepared"
    build_scenes(directory, sizes={"train": 400})
    return directory


def config_of(file, variant=""):
    return schema.resolve(runpy.run_path(str(CONFIGS / f"{file}.py"))["get_config"](variant))


def check(sample, others, config, groups, room):
    batch_shape = batch_shapes.choose(
        sample, batch_size=config.train.batch_size, groups=groups, row_tokens=config.data.row_tokens, room=room
    )
    reached = batch_shapes.fill(others, batch_shape)
    other, binds = sorted((reached["tokens"], reached["patches"]))
    assert binds >= 0.95 and other >= 0.90, (reached, batch_shape)
    assert reached["examples"] >= 0.94, (reached, batch_shape)


class WithLatents:
    """A source whose records bring latents, as from a cache."""

    def __init__(self, source):
        self.source = source

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        return {**self.source[index], "latents": np.zeros((16, 8), np.float32)}


@pytest.mark.parametrize(("file", "cached"), [("pretrain", False), ("pretrain", True), ("finetune", False)])
def test_the_embedded_configs_fill_their_batches_with_scenes(scenes, file, cached):
    config = config_of(file)
    method = methods.find(config.method)
    processor, source = Processor.from_directory(TINY_VL), sources.open_source(config.data.name, scenes, "train")
    source = WithLatents(source) if cached else source
    examples = pipeline.sample_examples(
        source, lambda *record: method.layout(*record, config, processor), processor, 400
    )
    sizes = [packing.size_of(example) for example in examples]
    others = sizes[SAMPLE:]
    # Draws with replacement from what the choice has not seen, in the data order's pattern of replayed examples.
    drawn = np.random.default_rng(0).integers(len(others) // 4, size=COUNT)
    others = [others[4 * place + number % 4] for number, place in enumerate(drawn)]
    check(sizes[:SAMPLE], others, config, 2, method.room(config))


# ---------------------------------------------------------------- as of COCO: its images' sizes, its captions' lengths

SHAPES = {(640, 480): 45, (480, 640): 20, (640, 427): 15, (427, 640): 8, (500, 375): 7, (612, 612): 3, (640, 360): 2}


def coco_like(config, count, seed, cached=False):
    """Sizes of examples as the published configs would show COCO: captions, every fourth an image -> caption."""
    rng = np.random.default_rng(seed)
    shapes = [shape for shape, share in SHAPES.items() for _ in range(share)]
    sizes = []
    for number in range(count):
        width, height = shapes[rng.integers(len(shapes))]
        rows, columns = smart_resize(height, width, 28, 56 * 56, config.data.max_pixels)
        merged = rows // 28 * (columns // 28)
        words = int(np.clip(rng.normal(13, 3), 8, 45))
        if config.method == "sft":
            # Six questions about an image, each a view of its own.
            tokens = 20 + merged + int(sum(rng.integers(14, 30, 6)))
        else:
            tokens = merged + 25 + words if number % 4 == 3 else words + 3 + config.latent.grid**2
        patches = 0 if cached and number % 4 != 3 else 4 * merged
        sizes.append(Size(tokens, patches, 0, 588, patches))
    return sizes


@pytest.mark.parametrize(("file", "cached"), [("pretrain", False), ("pretrain", True), ("finetune", False)])
def test_the_published_configs_fill_their_batches_with_coco_like_examples(file, cached):
    config = config_of(file, "qwen2_5_vl_7b")
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=256))
    sample, others = (coco_like(config, count, seed, cached) for seed, count in enumerate((SAMPLE, COUNT)))
    check(sample, others, config, 8, Room(slots=config.latent.grid**2 if file == "pretrain" else 0))
