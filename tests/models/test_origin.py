"""What a workdir keeps for its exports: pixel limits of the run, and damage that is noticed."""

import json
import shutil

import pytest

from latent_jax.data.image_spec import ImageSpec
from latent_jax.errors import UserError
from latent_jax.models import sums
from latent_jax.models.origin import check_origin, keep_origin
from tests.reference import small


@pytest.fixture
def kept(tmp_path):
    keep_origin(small.directory(), tmp_path / "hf_files")
    return tmp_path / "hf_files"


def test_what_was_kept_is_whole(kept):
    check_origin(kept)


DAMAGE = {
    "config.json deleted": ("config.json", lambda file: file.unlink()),
    "config.json not text": ("config.json", lambda file: file.write_bytes(b"\xff")),
    "tokenizer.json cut": ("tokenizer.json", lambda file: file.write_bytes(file.read_bytes()[:5000])),
    "one bit": ("preprocessor_config.json", lambda file: file.write_bytes(bytes([file.read_bytes()[0] ^ 1]))),
    "emptied": ("merges.txt", lambda file: file.write_bytes(b"")),
    "checksums": (sums.FILE, lambda file: file.write_bytes(b"{")),
}


@pytest.mark.parametrize("name, damage", DAMAGE.values(), ids=DAMAGE)
def test_a_file_that_changed_is_named(kept, name, damage):
    damage(kept / name)
    with pytest.raises(UserError, match=f"^{kept / name}: ") as problem:
        check_origin(kept)
    assert "\n" not in str(problem.value)


def test_a_workdir_of_an_earlier_version_has_no_checksums(kept):
    (kept / sums.FILE).unlink()
    check_origin(kept)
    (kept / "config.json").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"config\.json"):
        check_origin(kept)


def test_the_runs_pixel_limits_and_shape_are_kept(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(small.directory(), source)
    shape = json.loads((source / "config.json").read_text()) | {"max_position_embeddings": 77}
    (tmp_path / "shape.json").write_text(json.dumps(shape))
    kept = tmp_path / "hf_files"
    keep_origin(source, kept, shape=tmp_path / "shape.json", min_pixels=784, max_pixels=3136)
    check_origin(kept)
    assert json.loads((kept / "config.json").read_text())["max_position_embeddings"] == 77
    spec = ImageSpec.from_directory(kept)
    assert (spec.min_pixels, spec.max_pixels) == (784, 3136)
    assert ImageSpec.from_directory(source).max_pixels != 3136
