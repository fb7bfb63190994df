"""What the builders share: they read a folder that the user has, and count what they skip."""

import abc
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
import tqdm

from latent_jax.data.builders.tally import Tally
from latent_jax.errors import UserError


class RawBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A TFDS builder over official files in `raw`.

    A subclass states FEATURES, `find() -> {split: place}` and `examples(place, tally)`, an iterator of (key, features).
    Records keep the files' order. After `build`, `tallies` say what was skipped.
    """

    FEATURES: tfds.features.FeaturesDict
    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, raw: Path, max_bad: float, **options):
        self.raw, self._max_bad, self.tallies = Path(raw), max_bad, []
        super().__init__(file_format="array_record", **options)

    def build(self) -> None:
        """Writes `data_dir`/NAME/VERSION. Raises UserError where the files are not what they should be."""
        if not self.raw.is_dir():
            raise UserError(f"{self.raw}: no such folder, expected {self.name} in its official form")
        tfds.disable_progress_bar()  # ours counts records; TFDS's six nested bars count its own steps
        with tempfile.TemporaryDirectory() as unused:  # TFDS insists on making a download folder
            self.download_and_prepare(
                download_dir=unused, download_config=tfds.download.DownloadConfig(try_download_gcs=False)
            )

    @abc.abstractmethod
    def find(self) -> dict[str, Any]:
        """Split -> where its records are."""

    @abc.abstractmethod
    def examples(self, place: Any, tally: Tally) -> Iterator[tuple[int | str, dict]]:
        """(key, features) of every usable record."""

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self, description=type(self).__doc__, features=self.FEATURES, disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split, place) for split, place in self.find().items()}

    def _generate_examples(self, split, place):
        tally = Tally(split)
        self.tallies.append(tally)
        count = 0
        progress = tqdm.tqdm(self.examples(place, tally), desc=f"{self.name} {split}", unit=" records", mininterval=1.0)
        for key, example in progress:
            count += 1
            yield key, example
        tally.check(self._max_bad)
        if not count:
            raise UserError(f"{self.raw}: split {split} has no usable record")
