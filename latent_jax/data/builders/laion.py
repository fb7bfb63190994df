"""LAION (https://laion.ai), as img2dataset downloads it, to one record an image."""

from collections.abc import Iterator
from typing import Any

from latent_jax.data.builders import webdataset
from latent_jax.data.builders.base import RawBuilder
from latent_jax.data.builders.parts import Part, Record
from latent_jax.data.builders.tally import Tally
from latent_jax.errors import UserError


class Laion(RawBuilder):
    """One record an image with its text as the one caption; `meta` holds url, similarity and what else the set says."""

    name = "laion"

    def find(self) -> dict[str, Any]:
        found = webdataset.find(self.raw)
        if not found:
            only = "only the links (*.parquet)" if any(self.raw.rglob("*.parquet")) else "no *.tar"
            raise UserError(
                f"{self.raw}: {only} here, expected webdataset shards: img2dataset --output_format=webdataset "
                "--input_format=parquet --url_col=URL --caption_col=TEXT"
            )
        return found

    def parts(self, place: Any, tally: Tally) -> list[Part]:
        return webdataset.parts(place)

    def examples(self, part: Part, tally: Tally) -> Iterator[Record]:
        return webdataset.examples(part.place, tally)
