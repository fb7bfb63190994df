"""Conceptual Captions 3M (https://ai.google.com/research/ConceptualCaptions) to one record an image.

Published are links only, `caption<TAB>url` in Train_GCC-training.tsv and Validation_GCC-1.1.0-Validation.tsv without a
header. The images come from img2dataset (*.tar, train/*.tar, val/*.tar), which is preferred, or lie beside the TSV as
the common download script names them: training/LINE_CRC or validation/LINE_CRC, LINE the row from 0, CRC zlib.crc32 of
the url, with or without a suffix. A row without an image counts as a failed download.
"""

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latent_jax.data.builders import parts, webdataset
from latent_jax.data.builders.base import RawBuilder, each, record
from latent_jax.data.builders.files import read_image
from latent_jax.data.builders.parts import Part, Record
from latent_jax.data.builders.tally import Tally
from latent_jax.errors import UserError

_FOLDERS = {"train": "training", "validation": "validation"}
_Row = tuple[int, str, Path]  # its number, the caption, the image file


class ConceptualCaptions(RawBuilder):
    """One record an image with its one caption; `key` is the shard's, or the row of the TSV."""

    name = "conceptual_captions"

    def find(self) -> dict[str, Any]:
        """Split -> shards, or the TSV."""
        if shards := webdataset.find(self.raw):
            return shards
        found: dict[str, Path] = {}
        for file in sorted(self.raw.glob("*.tsv")):
            split = "validation" if file.name.lower().startswith("val") else "train"
            if split in found:
                raise UserError(f"{file}: {found[split].name} is also there and both are {split}; keep one of them")
            found[split] = file
        if not found:
            raise UserError(f"{self.raw}: neither webdataset shards (*.tar) nor caption<TAB>url files (*.tsv) here")
        return found

    def parts(self, place: Any, tally: Tally) -> list[Part]:
        if isinstance(place, list):
            return webdataset.parts(place)
        folder = self.raw / _FOLDERS["validation" if place.name.lower().startswith("val") else "train"]
        if not folder.is_dir():
            raise UserError(
                f"{place}: the images are expected in {folder}/, or as webdataset shards: img2dataset "
                "--output_format=webdataset --input_format=tsv --url_col=url --caption_col=caption"
            )
        images = {file.name.partition(".")[0]: file for file in sorted(folder.iterdir())}
        return parts.chunks(_rows(place, images, tally), (place,))

    def examples(self, part: Part, tally: Tally) -> Iterator[Record]:
        if isinstance(part.place, Path):
            yield from webdataset.examples(part.place, tally)
            return

        def make(row: _Row) -> Record:
            number, caption, file = row
            return record(f"{number}", images=[read_image(file)], captions=[caption])

        yield from each(part.place, "image", tally, make, lambda row: f"of row {row[0]}")


def _rows(file: Path, images: dict[str, Path], tally: Tally) -> list[_Row]:
    """The rows whose image is there."""
    rows = []
    if not file.is_file():  # a FIFO would be waited for
        raise UserError(f"{file}: not a regular file")
    with file.open(encoding="utf-8-sig", errors="replace", newline="\n") as lines:
        for number, line in enumerate(lines):
            caption, tab, url = line.rstrip("\r\n").partition("\t")
            if not tab or not caption.strip() or not url.strip():
                tally.see("caption")
                tally.skip("caption", f"{file}: row {number}: expected caption<TAB>url, got {line[:60]!r}")
                continue
            tally.see("caption")
            tally.see("download")
            name = f"{number}_{zlib.crc32(url.encode()) & 0xFFFFFFFF}"
            if name in images:
                rows.append((number, caption.strip(), images[name]))
            else:
                tally.skip("download", f"{file}: row {number}: no {name} for {url[:80]}")
    if not rows:
        raise UserError(f"{file}: no row has an image; expected names like LINE_CRC, LINE from 0, CRC crc32 of the url")
    return rows
