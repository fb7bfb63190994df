r"""Imagines pictures from words and looks at the nearest true pictures: one PNG.

    python examples/imagine_and_look.py --workdir=runs/pretrain --output=look.png
    python examples/imagine_and_look.py --workdir=runs/look --steps=100 --words='large red cube top left.'

`--workdir` is a finished run of configs/pretrain.py. Where there is none yet, a short one is made first (--steps, a
minute or two on two CPU cores): enough to see what happens, far from what `make pretrain` reaches. Needs the extra
`plots`; run it in the folder that holds configs/ and examples/.
"""

import importlib.util
import textwrap
from pathlib import Path

import numpy as np

import latent_jax
from latent_jax import train
from latent_jax.config import schema
from latent_jax.data import sources
from latent_jax.data.images import open_image
from latent_jax.errors import UserError
from latent_jax.runtime.command import Parser, command
from latent_jax.training.workdir import is_workdir

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "pretrain.py"
CAPTIONS, NEAREST = 3, 4


def short_run(workdir: Path, steps: int, data: str = "") -> None:
    """Latent pretraining of the embedded model, as configs/pretrain.py describes it, for fewer steps."""
    spec = importlib.util.spec_from_file_location("pretrain_config", CONFIG)
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    config = module.get_config()
    config.train.steps, config.data.path = steps, data
    config.latent.statistics_examples = min(512, 16 * steps)
    train.run(schema.resolve(config), workdir)


def unit(latents: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """(N, S, Z) -> (N, S * Z) of length 1, without what all pictures share."""
    flat = (latents - mean).reshape(len(latents), -1)
    return flat / np.linalg.norm(flat, axis=1, keepdims=True)


def look(vlm, records: list[dict], words: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """For all words the nearest records, nearest first, and their cosines: (words, NEAREST) each."""
    true = np.stack([vlm.encode_image(record["images"][0]) for record in records])  # (N, S, Z): the frozen encoder
    imagined = np.stack([vlm.imagine(text) for text in words])  # (W, S, Z): the language model, from words alone
    if imagined.shape[1:] != true.shape[1:]:
        raise UserError(
            f"{vlm.name}: imagines {imagined.shape[1:]}, pictures are {true.shape[1:]}; expected latent.grid=4"
        )
    mean = true.mean((0, 1))
    cosine = unit(imagined, mean) @ unit(true, mean).T
    order = np.argsort(-cosine, axis=1)[:, :NEAREST]
    return order, np.take_along_axis(cosine, order, axis=1)


def draw(records: list[dict], words: list[str], order: np.ndarray, cosine: np.ndarray, output: Path) -> None:
    """A row for all words: their own picture, where they are a caption, and the nearest ones."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    own = {record["captions"][0]: index for index, record in enumerate(records)}
    size, widths = (2.1 * NEAREST + 5.2, 2.3 * len(words) + 0.9), [1.2, 1, 0.08] + [1] * NEAREST
    figure, axes = plt.subplots(len(words), NEAREST + 3, figsize=size, squeeze=False, width_ratios=widths)
    for row, text, found, near in zip(axes, words, order, cosine, strict=True):
        row[0].text(0, 0.97, textwrap.fill(text, 24), va="top", fontsize=10, transform=row[0].transAxes)
        shown = [(row[1], own[text], "its own picture")] if text in own else []
        shown += [(place, i, f"cosine {c:.2f}") for place, i, c in zip(row[3:], found, near, strict=True)]
        for place, index, title in shown:
            picture = open_image(records[index]["images"][0])
            place.imshow(picture)
            place.set_title(title, fontsize=10)
            if place is not row[1] and index == own.get(text):
                frame = plt.Rectangle((-0.5, -0.5), picture.width, picture.height, fill=False, color="#008040", lw=6)
                place.add_patch(frame)
    for place in axes.flat:
        place.axis("off")
    title = (
        f"Right: of {len(records)} held-out pictures, the {NEAREST} nearest to what is imagined from the words alone."
    )
    figure.suptitle(f"{title}\nGreen frame: the words' own picture is among them.", fontsize=12)
    figure.tight_layout()
    figure.savefig(output, dpi=110)
    plt.close(figure)


@command
def main(arguments: list[str] | None = None) -> None:
    parser = Parser(description="Imagines pictures from words and looks at the nearest true pictures.")
    parser.add_argument("--workdir", type=Path, default=Path("runs/pretrain"), help="a run, made where it is not there")
    parser.add_argument("--steps", type=int, default=100, help="of the run that is made")
    parser.add_argument("--data", default="", help="prepared scenes; default: generated on first use")
    parser.add_argument("--words", action="append", default=[], help="imagined too; may be given several times")
    parser.add_argument("--pictures", type=int, default=200, help="held-out pictures to look among")
    parser.add_argument("--output", type=Path, default=Path("look.png"))
    options = parser.parse_args(arguments)
    if not importlib.util.find_spec("matplotlib"):
        raise UserError("a picture needs matplotlib: pip install -c constraints.txt -e '.[plots]'")
    if options.pictures < NEAREST:
        raise UserError(f"--pictures={options.pictures}: expected at least {NEAREST}")
    if not is_workdir(options.workdir):
        short_run(options.workdir, options.steps, options.data)
    vlm = latent_jax.load(options.workdir)
    source = sources.open_source("scenes", options.data, "validation")
    records = [source[index] for index in range(min(options.pictures, len(source)))]
    words = [record["captions"][0] for record in records[:CAPTIONS]] + options.words
    order, cosine = look(vlm, records, words)
    draw(records, words, order, cosine, options.output)
    for index, text in enumerate(words[:CAPTIONS]):
        print(f"{text} -> {'its own picture' if order[index, 0] == index else 'another picture'} is nearest")
    print(f"picture: {options.output}")


if __name__ == "__main__":
    main()
