"""Patches against stock transformers (PIL backend), and one clear line for every bad file."""

import io
import json

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2VLImageProcessorPil
from transformers.image_utils import load_image
from transformers.vision_utils import get_vision_window_index

from latent_jax.data import images
from latent_jax.data.image_spec import ImageSpec
from latent_jax.data.images import open_image, patchify, patchify_video
from latent_jax.errors import UserError

SPEC = ImageSpec(min_pixels=56 * 56, max_pixels=300 * 300)
HF = Qwen2VLImageProcessorPil(size={"shortest_edge": SPEC.min_pixels, "longest_edge": SPEC.max_pixels})


def noise(height, width, channels=3, seed=0):
    """Photo-like: smooth shading and noise on it."""
    rng = np.random.default_rng(seed)
    smooth = rng.uniform(0, 200, (3, 3, channels)).repeat(-(-height // 3), 0).repeat(-(-width // 3), 1)
    return np.clip(smooth[:height, :width] + rng.normal(0, 30, (height, width, channels)), 0, 255).astype(np.uint8)


def normalised(patches, spec, frames):
    """uint8 patches to HF's float patches with both temporal frames; HF's order of merged tokens restored."""
    x = patches.patches.astype(np.float64).reshape(len(patches.patches), 3, -1, spec.patch_size**2)
    x = np.repeat(x, frames // x.shape[2], axis=2)
    mean, std = (np.array(value).reshape(3, 1, 1) for value in (spec.mean, spec.std))
    x = ((x / 255 - mean) / std).reshape(len(x), -1)
    index, _ = get_vision_window_index(torch.tensor([patches.grid]), spec.merge_size, spec.window_size, spec.patch_size)
    return x.reshape(len(index), spec.merge_unit, -1)[np.argsort(index.numpy())].reshape(len(x), -1)


def check_equal(ours, theirs):
    patches = patchify(ours, SPEC)
    expected = HF(images=[theirs], return_tensors="np")
    assert [list(patches.grid)] == expected["image_grid_thw"].tolist()
    np.testing.assert_allclose(normalised(patches, SPEC, 2), expected["pixel_values"], atol=1e-6)


@pytest.mark.parametrize(("height", "width"), [(240, 320), (1, 150), (57, 31), (300, 1203), (112, 112), (700, 499)])
def test_equals_hf_at_any_size(height, width):
    image = PIL.Image.fromarray(noise(height, width))
    check_equal(open_image(image), image)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "L", "P", "1", "CMYK", "PA", "I;16"])
def test_modes_convert_as_in_hf_in_memory_and_from_files(mode, tmp_path):
    rgba = PIL.Image.fromarray(noise(90, 120, 4, seed=3))
    if mode == "P":
        image = rgba.convert("RGB").quantize(16)
        image.info["transparency"] = 3
    elif mode == "I;16":
        image = PIL.Image.fromarray(noise(90, 120, 1)[..., 0].astype(np.uint16) * 3)
    elif mode == "PA":
        image = rgba.convert("LA").convert("PA")
    else:
        image = rgba.convert(mode) if mode != "CMYK" else rgba.convert("RGB").convert("CMYK")
    check_equal(open_image(image), image)
    if mode not in ("PA",):
        path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
        image.save(path)
        check_equal(open_image(path), load_image(str(path)))
        check_equal(open_image(path.read_bytes()), load_image(str(path)))


@pytest.mark.parametrize("shape", [(60, 80), (60, 80, 1), (60, 80, 4), (3, 60, 80)])
def test_arrays_convert_as_in_hf(shape):
    array = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    check_equal(open_image(array), array if array.ndim == 3 else array[..., None])


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_exif_rotation_follows_load_image(orientation, tmp_path):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    PIL.Image.fromarray(noise(80, 160)).save(tmp_path / "x.jpg", exif=exif)
    check_equal(open_image(tmp_path / "x.jpg"), load_image(str(tmp_path / "x.jpg")))
    assert open_image(tmp_path / "x.jpg").size == ((160, 80) if orientation == 3 else (80, 160))


@given(st.integers(1, 500), st.integers(1, 500), st.sampled_from([(14, 2, 112), (14, 2, 56), (8, 1, 24), (4, 4, 32)]))
@settings(max_examples=40, deadline=None)
def test_window_order_and_positions_are_those_of_hf(height, width, sizes):
    if max(height, width) > 200 * min(height, width):
        return
    spec = ImageSpec(sizes[0], 2, sizes[1], sizes[2], 40 * 40, 200 * 200)
    patches = patchify(PIL.Image.new("RGB", (width, height)), spec)
    index, lengths = get_vision_window_index(
        torch.tensor([patches.grid]), spec.merge_size, spec.window_size, spec.patch_size
    )
    np.testing.assert_array_equal(np.bincount(patches.window)[1:], np.diff(lengths.numpy()))
    assert (np.diff(patches.window) >= 0).all()
    rows, columns, merge = patches.grid[1], patches.grid[2], spec.merge_size
    grouped = [
        (r, c)
        for top in range(0, rows, merge)
        for left in range(0, columns, merge)
        for r in range(top, top + merge)
        for c in range(left, left + merge)
    ]
    expected = np.array(grouped).reshape(-1, spec.merge_unit, 2)[index.numpy()].reshape(-1, 2)
    np.testing.assert_array_equal(patches.positions, expected)
    np.testing.assert_array_equal(images.merged_index(patches, merge), np.argsort(index.numpy()))


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_video_equals_hf_patches_of_the_resized_frames(frames):
    spec = ImageSpec(min_pixels=56 * 56, max_pixels=150 * 150)
    clip = [PIL.Image.fromarray(noise(130, 170, seed=seed)) for seed in range(frames)]
    patches = patchify_video(clip, spec)
    expected = hf_video_patches(clip, spec)
    np.testing.assert_allclose(normalised(patches, spec, 2), expected, atol=1e-6)
    assert patches.grid[0] == -(-frames // 2)
    assert sorted(set(patches.image)) == list(range(1, patches.grid[0] + 1))
    per_slice = [set(patches.window[patches.image == image]) for image in set(patches.image)]
    assert sum(map(len, per_slice)) == len(set.union(*per_slice)), "a window must not span two slices"


def hf_video_patches(clip, spec):
    """The image processor's pixels of each frame, laid out by the reshape of HF's video processor."""
    still = Qwen2VLImageProcessorPil(size={"shortest_edge": spec.min_pixels, "longest_edge": spec.max_pixels})
    clip = clip + clip[-1:] * (len(clip) % 2)
    pixels = [still(images=[frame], return_tensors="np")["pixel_values"] for frame in clip]
    pixels = [x.reshape(len(x), 3, 2, -1)[:, :, 0] for x in pixels]
    return np.concatenate(
        [np.stack(pair, axis=2).reshape(len(pair[0]), -1) for pair in zip(pixels[::2], pixels[1::2], strict=True)]
    )


def test_smart_resize_equals_hf():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    rng = np.random.default_rng(0)
    for height, width in rng.integers(20, 3000, (300, 2)).tolist():
        assert images.smart_resize(height, width, 28, 3136, 401408) == smart_resize(height, width, 28, 3136, 401408)


def jpeg():
    buffer = io.BytesIO()
    PIL.Image.fromarray(noise(100, 100)).save(buffer, "jpeg")
    return buffer.getvalue()


def test_bad_images_are_named(tmp_path):
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "cut.jpg").write_bytes(jpeg()[:700])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "thin.png").write_bytes(b"")
    PIL.Image.new("RGB", (1, 201)).save(tmp_path / "thin.png")
    for name in ("text.jpg", "cut.jpg", "empty.png", "thin.png", "missing.png"):
        with pytest.raises(UserError, match=name.replace(".", r"\.")) as caught:
            open_image(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="record 7"):
        open_image(jpeg()[:700], "record 7")
    with pytest.raises(UserError, match="uint8"):
        open_image(np.zeros((4, 4, 3), np.float32))
    with pytest.raises(UserError, match="int"):
        open_image(3)
    with pytest.raises(UserError, match="one size"):
        patchify_video([PIL.Image.new("RGB", (60, 60)), PIL.Image.new("RGB", (60, 61))], SPEC)


def write_checkpoint(directory, settings, vision=None, name="preprocessor_config.json"):
    (directory / name).write_text(json.dumps(settings))
    (directory / "config.json").write_text(json.dumps({"vision_config": vision or {"window_size": 56}}))
    return directory


def test_spec_reads_both_key_styles(tmp_path):
    published = {
        "min_pixels": 3136,
        "max_pixels": 12845056,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.2, 0.2, 0.1],
    }
    spec = ImageSpec.from_directory(write_checkpoint(tmp_path, published))
    assert spec == ImageSpec(14, 2, 2, 56, 3136, 12845056, (0.5, 0.4, 0.3), (0.2, 0.2, 0.1))
    current = {key: value for key, value in published.items() if not key.endswith("_pixels")}
    current["size"] = {"shortest_edge": 3136, "longest_edge": 12845056}
    assert ImageSpec.from_directory(write_checkpoint(tmp_path, current)) == spec
    assert ImageSpec.from_directory(tmp_path, max_pixels=50176).max_pixels == 50176
    (tmp_path / "preprocessor_config.json").unlink()
    nested = {"image_processor": current}
    assert ImageSpec.from_directory(write_checkpoint(tmp_path, nested, name="processor_config.json")) == spec


@pytest.mark.parametrize(
    ("settings", "vision", "word"),
    [
        ({"do_resize": False}, None, "do_resize"),
        ({"rescale_factor": 0.5}, None, "rescale_factor"),
        ({"patch_size": 16}, {"patch_size": 14, "window_size": 112}, "patch_size"),
        ({"min_pixels": 9, "max_pixels": 4}, None, "min_pixels"),
        ({}, {"window_size": 113}, "window_size"),
    ],
)
def test_spec_refuses_what_it_cannot_follow(settings, vision, word, tmp_path):
    with pytest.raises(UserError, match=word):
        ImageSpec.from_directory(write_checkpoint(tmp_path, settings, vision))


def test_spec_names_the_missing_file(tmp_path):
    with pytest.raises(UserError, match="preprocessor_config.json"):
        ImageSpec.from_directory(tmp_path)
