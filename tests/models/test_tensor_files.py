"""The safetensors reader and writer against the reference package."""

import json
import os

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors import SafetensorError, safe_open
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


PLAIN = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
OTHER = {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]}
VALUES = [None, True, 0, 1, -1, 2.0, 2**64, "F32", "2", [], [0], [2], [1, 2], [8, 12], [0, 8], [4, 12], [0, 12], {}]


def put(path, header: str | bytes, size: int):
    text = header if isinstance(header, bytes) else header.encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))


def accepted(path) -> tuple[bool, bool]:
    """(by ours, by the reference package)"""
    try:
        tensor_files.read(path)
        ours = True
    except UserError as problem:
        assert "\n" not in str(problem) and str(path) in str(problem)
        ours = False
    try:
        with safe_open(path, "np"):
            return ours, True
    except SafetensorError:
        return ours, False


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_changed_header_is_accepted_if_and_only_if_the_reference_accepts_it(tmp_path_factory, data):
    header = {"a": dict(PLAIN), "b": dict(OTHER), "__metadata__": {"format": "pt"}}
    for _ in range(data.draw(st.integers(1, 2))):
        where = data.draw(st.sampled_from(["a", "b", "__metadata__"]))
        key, value = data.draw(st.sampled_from([*PLAIN, "format", None])), data.draw(st.sampled_from(VALUES))
        if key is None or not isinstance(header[where], dict):
            # The reference takes a list for a tensor's three fields in their order; nobody writes that.
            header[where] = {} if isinstance(value, list) else value
        else:
            header[where] = header[where] | {key: value}
    size = data.draw(st.sampled_from([12, 12, 12, 8, 0, 13]))
    path = tmp_path_factory.mktemp("changed") / "a.safetensors"
    put(path, json.dumps(header), size)
    ours, theirs = accepted(path)
    assert ours == theirs


@pytest.mark.parametrize(
    "header, size, fault",
    [
        ('{"a": [0]}', 0, "tensor 'a': expected dtype"),
        ("[]", 0, "no JSON object"),
        ('{"a": ' + "[" * 100_000, 0, "its header is damaged"),
        (b'{"\xff": {}}', 0, "its header is damaged"),
        ("\ufeff{}", 0, "its header is damaged"),
        ('{"a": {"dtype": "F32", "shape": [-0], "data_offsets": [0, 0]}}', 0, "non-negative"),
        ('{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 0]}}', 0, "NaN"),
        ('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}', 12, "'a' follows a hole"),
        (json.dumps({"a": PLAIN, "b": PLAIN}), 8, "overlaps another"),
    ],
)
def test_what_the_reference_refuses_is_refused(tmp_path, header, size, fault):
    put(tmp_path / "a.safetensors", header, size)
    with pytest.raises(UserError, match=fault):
        tensor_files.read(tmp_path / "a.safetensors")
    assert accepted(tmp_path / "a.safetensors") == (False, False)


def test_a_name_that_stands_twice_is_refused(tmp_path):
    entry = json.dumps(PLAIN)
    put(tmp_path / "a.safetensors", f'{{"w": {entry}, "w": {entry}}}', 8)
    with pytest.raises(UserError, match="'w' stands in it twice"):
        tensor_files.read(tmp_path / "a.safetensors")


def test_a_file_without_an_end_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="not a regular file"):
        tensor_files.read(tmp_path / "a.safetensors")


def test_a_disk_that_is_full_is_told_with_the_file(tmp_path):
    (tmp_path / "model.safetensors.partial").symlink_to("/dev/full")
    array = np.ones(2**16, np.float32)
    with pytest.raises(OSError, match="No space left") as raised:
        tensor_files.write(tmp_path / "model.safetensors", {"w": Entry.of(array)})
    assert raised.value.filename == str(tmp_path / "model.safetensors")
