"""Small folders in the official forms, and the command run on them."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from latent_jax import prepare
from latent_jax.data import sources


def picture(seed: int, form: str = "JPEG") -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (24, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


def status_of(*flags) -> int:
    """The exit status of the command `prepare`."""
    try:
        return prepare.main([*map(str, flags)])
    except SystemExit as ended:
        return ended.code


def run(capsys, dataset, raw, output, *flags) -> tuple[int, str]:
    """(exit status, what was said); nothing may be said on standard output."""
    status = status_of(f"--dataset={dataset}", f"--raw={raw}", f"--output={output}", *flags)
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    return status, err


def records(dataset, output, split) -> dict[str, dict]:
    """Key -> record; keys must be unique."""
    source = sources.open_source(dataset, output, split)
    found = {record["key"]: record for record in source}
    assert len(found) == len(source)
    assert {record.pop("dataset") for record in found.values()} == {dataset}
    return found


def skipped(output) -> list[dict]:
    """The lines of the one skipped.jsonl."""
    (file,) = Path(output).rglob("skipped.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def samples(start: int, count: int) -> dict[str, dict[str, bytes]]:
    """Image-caption samples as img2dataset makes them: key -> {suffix: content}."""
    made = {}
    for i in range(start, start + count):
        key = f"{i // 10000:05}{i % 10000:04}"
        meta = {"caption": f"Picture {i}.", "url": f"http://x/{i}", "key": key, "status": "success", "width": 40}
        made[key] = {
            "jpg": picture(i),
            "txt": f"Picture {i}.".encode(),
            "json": json.dumps({**meta, "similarity": 0.25, "error_message": None, "exif": "{}"}).encode(),
        }
    return made


def write_tar(file: Path, content: dict[str, dict[str, bytes]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as archive:
        for key, fields in content.items():
            for suffix, data in fields.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size, info.mtime = len(data), 1700000000.5  # a fraction makes Python write a pax header
                archive.addfile(info, io.BytesIO(data))


def coco_folder(root, count=40, split="train2017"):
    """COCO's layout: captions_SPLIT.json, and SPLIT/000000000009.jpg; two captions an image."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / split).mkdir()
    images = [{"id": 9 + i, "file_name": f"{9 + i:012}.jpg", "width": 40, "height": 24} for i in range(count)]
    for image in images:
        (root / split / image["file_name"]).write_bytes(picture(image["id"]))
    annotations = [
        {"id": 100 + 2 * i + j, "image_id": 9 + i, "caption": f" Caption {j} of {9 + i}.\n"}
        for j in range(2)
        for i in range(count)
    ]
    content = {"info": {}, "licenses": [], "images": images, "annotations": annotations}
    write_captions(root, content, split)
    return content


def write_captions(root, content, split="train2017"):
    (root / "annotations" / f"captions_{split}.json").write_text(json.dumps(content))
