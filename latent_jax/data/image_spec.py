"""How a checkpoint's images become patches: its preprocessor_config.json and vision_config as one value."""

import dataclasses
import math
from pathlib import Path

from latent_jax.config import fields
from latent_jax.errors import UserError
from latent_jax.runtime import files


@dataclasses.dataclass(frozen=True)
class ImageSpec:
    """How images become patches. patch_size and window_size in pixels, merge_size in patches, pixel limits in pixels.

    mean and std are per channel, of pixels scaled to 0..1; the device applies them to the uint8 patches.
    """

    patch_size: int = fields.option(14, "side of a patch", low=1, high=1024)
    temporal_patch_size: int = fields.option(2, "frames of a patch", low=1, high=64)
    merge_size: int = fields.option(2, "side of a merged token, in patches", low=1, high=64)
    window_size: int = fields.option(112, "side of an attention window", low=1, high=2**20)
    min_pixels: int = fields.option(56 * 56, "smaller images are enlarged", low=1, high=2**31)
    max_pixels: int = fields.option(28 * 28 * 1280, "larger images are shrunk", low=1, high=2**31)
    mean: tuple[float, float, float] = fields.option((0.48145466, 0.4578275, 0.40821073), "of the channels")
    std: tuple[float, float, float] = fields.option((0.26862954, 0.26130258, 0.27577711), "of the channels", above=0)

    def __post_init__(self) -> None:
        if self.window_size % self.factor:
            raise UserError(
                f"window_size {self.window_size} must be a multiple of patch_size * merge_size = {self.factor}"
            )
        if not 0 < self.min_pixels <= self.max_pixels:
            raise UserError(f"min_pixels {self.min_pixels} must be positive and at most max_pixels {self.max_pixels}")

    @property
    def factor(self) -> int:
        """Side of a merged token, in pixels."""
        return self.patch_size * self.merge_size

    @property
    def merge_unit(self) -> int:
        """Patches under one merged token."""
        return self.merge_size**2

    @property
    def window_patches(self) -> int:
        """Most patches that one attention window holds."""
        return (self.window_size // self.patch_size) ** 2

    @classmethod
    def from_directory(
        cls, directory: str | Path, min_pixels: int | None = None, max_pixels: int | None = None
    ) -> "ImageSpec":
        """Reads preprocessor_config.json (or transformers 5's processor_config.json) and config.json's vision_config.

        `min_pixels` and `max_pixels` replace the checkpoint's. Raises UserError naming the file and the key.
        """
        directory = Path(directory)
        name = "preprocessor_config.json"
        if not (directory / name).exists() and (directory / "processor_config.json").exists():
            name = "processor_config.json"
        settings = read_json(directory / name)
        settings = _section(settings, "image_processor", directory / name) or settings
        vision = _section(read_json(directory / "config.json"), "vision_config", directory / "config.json")
        if vision is None:
            raise UserError(f"{directory / 'config.json'}: key 'vision_config' is missing")
        try:
            kept = cls._of(settings, vision)
        except UserError as problem:
            raise UserError(f"{directory / name}: {problem}") from None
        spec = kept._with_pixels(min_pixels, max_pixels, directory / name)
        for key, ours in (
            ("patch_size", spec.patch_size),
            ("temporal_patch_size", spec.temporal_patch_size),
            ("spatial_merge_size", spec.merge_size),
        ):
            if vision.get(key, ours) != ours:
                raise UserError(
                    f"{directory / name}: {key.removeprefix('spatial_')} is {ours}, but config.json's "
                    f"vision_config.{key} is {vision[key]}"
                )
        return spec

    def _with_pixels(self, min_pixels: int | None, max_pixels: int | None, file: Path) -> "ImageSpec":
        """With limits in the place of the checkpoint's. Raises UserError where the two that then hold do not agree."""
        least, most = min_pixels or self.min_pixels, max_pixels or self.max_pixels
        if least > most:
            given = f"config.data.max_pixels: got {most}" if max_pixels else f"config.data.min_pixels: got {least}"
            other = f"min_pixels = {least}" if max_pixels else f"max_pixels = {most}"
            raise UserError(
                f"{given}, but {other} of {'config.data' if min_pixels and max_pixels else file}; expected a range"
            )
        return dataclasses.replace(self, min_pixels=least, max_pixels=most)

    @classmethod
    def _of(cls, settings: dict, vision: dict) -> "ImageSpec":
        _check_supported(settings)
        size = settings.get("size")
        size = size if isinstance(size, dict) else {}
        sources = {
            "window_size": (vision, "window_size"),
            "min_pixels": _first(settings, {"min_pixels": size.get("shortest_edge")}, key="min_pixels"),
            "max_pixels": _first(settings, {"max_pixels": size.get("longest_edge")}, key="max_pixels"),
            "mean": (settings, "image_mean"),
            "std": (settings, "image_std"),
        }
        values = {}
        for field in dataclasses.fields(cls):
            source, key = sources.get(field.name, (settings, field.name))
            values[field.name] = fields.read(cls, field.name, source, key, default=field.default)
        return cls(**values)


def read_json(path: Path) -> dict:
    """A JSON object from a file; UserError naming the file where there is none."""
    if not Path(path).exists():
        raise UserError(f"{path}: no such file; expected a Hugging Face checkpoint directory")
    return files.read_json(path, expected="a JSON object of a Hugging Face checkpoint")


def _section(source: dict, key: str, path: Path) -> dict | None:
    section = source.get(key)
    if section is not None and not isinstance(section, dict):
        raise UserError(f"{path}: {key} is {fields.shown(section)}, expected an object")
    return section


def _first(*sources: dict, key: str) -> tuple[dict, str]:
    return next((source for source in sources if source.get(key) is not None), {}), key


def _check_supported(settings: dict) -> None:
    """Refuses preprocessing that would silently give other pixels than Qwen's."""
    for key, value in {
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
        "resample": 3,
    }.items():
        if settings.get(key, value) != value:
            raise UserError(f"{key} is {fields.shown(settings[key])}, expected {value!r}")
    factor = settings.get("rescale_factor", 1 / 255)
    if not isinstance(factor, float) or not math.isclose(factor, 1 / 255, rel_tol=1e-6):
        raise UserError(f"rescale_factor is {fields.shown(factor)}, expected 1/255")
