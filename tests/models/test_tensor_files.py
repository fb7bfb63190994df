"""The safetensors reader and writer against the reference package."""

import json

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.torch import load_file, save_file

from latent_jax.errors import UserError
from latent_jax.models import tensor_files
from latent_jax.models.tensor_files import Entry

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.int32, np.uint8, np.bool_]


@pytest.fixture
def written(tmp_path):
    """A file of the reference package with two tensors."""
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.arange(12.0).reshape(3, 4).bfloat16(), "b": torch.ones(2)}, path, {"format": "pt"})
    return path


def rewrite_header(path, edit):
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def test_reads_what_the_reference_package_wrote(written):
    tensors = tensor_files.read(written)
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()} == {
        "w": (ml_dtypes.bfloat16, (3, 4)),
        "b": (np.float32, (2,)),
    }
    np.testing.assert_array_equal(tensors["w"].astype(np.float32), np.arange(12.0).reshape(3, 4))


def test_read_tensors_are_views_of_the_file_not_copies(written):
    tensor = tensor_files.read(written)["w"]
    base = tensor
    while isinstance(base.base, np.ndarray):
        base = base.base
    assert type(base).__name__ == "memmap" or type(base.base).__name__ == "mmap"
    with pytest.raises(ValueError, match="read-only"):
        tensor[0, 0] = 1


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_the_reference_package_reads_what_we_write(tmp_path_factory, data):
    shapes = arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
    kinds = data.draw(st.lists(st.tuples(st.sampled_from(DTYPES), shapes), min_size=1, max_size=5))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    tensors = {f"t{i}": np.asarray(rng.random(shape) * 9).astype(dtype) for i, (dtype, shape) in enumerate(kinds)}
    path = tmp_path_factory.mktemp("written") / "a.safetensors"
    tensor_files.write(path, {name: Entry.of(tensor) for name, tensor in tensors.items()})
    theirs, ours = load_file(path), tensor_files.read(path)
    assert theirs.keys() == ours.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert theirs[name].shape == ours[name].shape == tensor.shape
        assert str(theirs[name].dtype).removeprefix("torch.") == str(tensor.dtype) == str(ours[name].dtype)
        assert theirs[name].reshape(-1).view(torch.uint8).numpy().tobytes() == tensor.tobytes() == ours[name].tobytes()


def test_pieces_may_be_cut_anywhere_and_need_not_be_contiguous(tmp_path):
    whole = np.arange(24, dtype=np.float32).reshape(6, 4)
    transposed = np.ascontiguousarray(whole.T).T
    entry = Entry(whole.dtype, whole.shape, lambda: [transposed[:1], transposed[1:5], transposed[5]])
    tensor_files.write(tmp_path / "a.safetensors", {"w": entry})
    np.testing.assert_array_equal(load_file(tmp_path / "a.safetensors")["w"].numpy(), whole)


def test_a_write_that_fails_leaves_no_file_of_that_name(tmp_path):
    entry = Entry(np.dtype(np.float32), (4,), lambda: [np.zeros(3, np.float32)])
    with pytest.raises(ValueError, match="12 bytes came, 16 were announced"):
        tensor_files.write(tmp_path / "a.safetensors", {"w": entry})
    assert not (tmp_path / "a.safetensors").exists()


def test_a_piece_of_another_dtype_is_refused(tmp_path):
    entry = Entry(np.dtype(np.float32), (4,), lambda: [np.zeros(2, np.float64)])
    with pytest.raises(TypeError, match="w: a piece is float64, announced as float32"):
        tensor_files.write(tmp_path / "a.safetensors", {"w": entry})


@pytest.mark.parametrize("keep", [-1, 100])  # one byte short; in the middle of the header
def test_a_truncated_file_is_named(written, keep):
    written.write_bytes(written.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"a\.safetensors: truncated: \d+ bytes"):
        tensor_files.read(written)


def test_trailing_bytes_are_an_error(written):
    written.write_bytes(written.read_bytes() + b"more")
    with pytest.raises(UserError, match=r"a\.safetensors: longer than its header says: \d+ bytes, expected \d+"):
        tensor_files.read(written)


@pytest.mark.parametrize(
    "content",
    [b"", b"abc", b"\xff" * 64, (4).to_bytes(8, "little") + b"nope", (11).to_bytes(8, "little") + b'{"w": "f32"'],
)
def test_another_kind_of_file_is_named(tmp_path, content):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.safetensors: not a safetensors file"):
        tensor_files.read(tmp_path / "a.safetensors")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"a\.safetensors: no such file"):
        tensor_files.read(tmp_path / "a.safetensors")


def test_a_shape_that_does_not_fill_its_bytes_is_named(written):
    rewrite_header(written, lambda header: header["w"].update(shape=[3, 5]))
    with pytest.raises(UserError, match=r"tensor 'w' of shape \(3, 5\) and dtype bfloat16 takes 30 bytes, .* it 24"):
        tensor_files.read(written)


def test_an_unknown_dtype_is_named(written):
    rewrite_header(written, lambda header: header["w"].update(dtype="F8_E4M3"))
    with pytest.raises(UserError, match="tensor 'w' has dtype F8_E4M3, expected one of F32, F16, BF16"):
        tensor_files.read(written)
