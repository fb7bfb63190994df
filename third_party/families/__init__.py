"""One file a model family, named as the `model_type` of its config.json: how an image is written and prepared."""

import importlib
import pkgutil
from pathlib import Path

from latent_jax.data.image_spec import read_json
from latent_jax.errors import UserError
from third_party.processor import Processor


def open_processor(directory: Path, min_pixels: int = 0, max_pixels: int = 0) -> Processor:
    """The processor of a checkpoint; pixel limits of 0 are the checkpoint's own.

    Raises UserError where the checkpoint is of no known family, or its family knows no limits.
    """
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    family = read_json(directory / "config.json").get("model_type")
    if family not in names:
        raise UserError(f"{directory}: model_type is {family!r}, expected one of {', '.join(names)}")
    module = importlib.import_module(f"{__name__}.{family}")
    return module.Family(directory, min_pixels, max_pixels)
