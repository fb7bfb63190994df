"""The world as ScienceQA, BLINK and VSP: through the real builders, each answer read again from the pictures."""

import collections
import io
import itertools
import json
import zlib

import numpy as np
import pytest
from PIL import Image
from reference.scene_answers import answer, holds, scene_of

from latent_jax.data import scenes, sources
from latent_jax.data.builders.build import build_scenes_benchmark
from latent_jax.data.frozen_lake import MOVES
from latent_jax.data.scenes import benchmarks, mazes, reflectance, world
from latent_jax.data.scenes.render import BACKGROUND, TILE, sprite
from latent_jax.errors import UserError

SIZES = {
    "scienceqa": {"train": 80, "validation": 8, "test": 40},
    "blink": {"train": 36, "validation": 12, "test": 3},
    "vsp": {"train": 12, "validation": 4, "test": 6},
}
SPRITES = {
    np.asarray(sprite(shape, color, size, "plain")).tobytes(): (shape, color, size)
    for shape, color, size in itertools.product(world.SHAPES, world.COLORS, world.SIZES)
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmarks")
    for name, sizes in SIZES.items():
        build_scenes_benchmark(name, folder / name, seed=3, sizes=sizes)
    return folder


def opened(prepared, name, split):
    return list(sources.open_source(f"scenes_{name}", prepared / name.split("/")[0], split))


def pixels(image):
    return np.asarray(Image.open(io.BytesIO(image))).astype(int)


def tile(image, x, y):
    return image[y - TILE // 2 : y + TILE // 2, x - TILE // 2 : x + TILE // 2]


def looks(image, x, y):
    """What stands at a place: the kind of thing whose sprite these pixels are, or None."""
    return SPRITES.get(tile(image, x, y).astype(np.uint8).tobytes())


def seen(image, placement):
    """The scene in a picture, thing by thing."""
    places = range(4) if placement == "grid" else range(world.LATTICE)
    probe = world.Scene((), placement)
    things, image = [], pixels(image)
    for y, x in itertools.product(places, places):
        center = probe.center(world.Thing("ball", "red", "large", "plain", x, y))
        if found := looks(image, *center):
            shape, color, size = found
            things.append(world.Thing(shape, color, size, "plain", x, y))
    return world.Scene(tuple(things), placement)


def test_scienceqa_problems_have_the_answers_of_their_scenes(prepared):
    kinds, subjects, grades, places = (collections.Counter() for _ in range(4))
    for split, official in (("train", "train"), ("validation", "val"), ("test", "test")):
        for record in opened(prepared, "scienceqa", split):
            (problem,) = record["questions"]
            assert problem["split"] == official and problem["id"] == record["key"]
            right = problem["choices"][problem["answer"]]
            assert len(set(problem["choices"])) == len(problem["choices"]) >= 2
            if record["images"]:
                assert answer(seen(record["images"][0], "grid"), problem["question"]) == right
            elif problem["hint"]:
                scene = scene_of(problem["hint"].removeprefix("A scene: "), "grid")
                assert answer(scene, problem["question"]) == right
            else:
                words = {"color": world.COLORS, "shape": world.SHAPES, "size": world.SIZES}
                words["place"] = world.ROWS + world.COLUMNS
                kind = problem["question"].split()[-1].rstrip("?")
                assert [word for word in problem["choices"] if word in words[kind]] == [right]
            kinds[bool(record["images"]), bool(problem["hint"])] += 1
            subjects[problem["subject"]] += 1
            grades[int(problem["grade"].removeprefix("grade"))] += 1
            places[problem["answer"], len(problem["choices"])] += 1
    assert set(kinds.values()) == {32} and len(kinds) == 4
    assert set(subjects) == {"natural science", "social science", "language science"} and min(subjects.values()) > 10
    assert sorted(grades) == list(range(1, 13))
    assert all(places[place, 4] > 0.12 * sum(places[i, 4] for i in range(4)) for place in range(4))


def test_counting(prepared):
    counts = collections.Counter()
    for record in opened(prepared, "blink/Counting", "train"):
        (question,) = record["questions"]
        right = question["choices"]["(A)(B)(C)(D)".index(question["answer"]) // 3]
        assert sorted(question["choices"]) == ["0", "1", "2", "3"]
        assert answer(seen(record["images"][0], "free"), question["question"]) == right
        counts[right] += 1
    assert set(counts.values()) == {9}


def test_spatial_relation(prepared):
    counts = collections.Counter()
    for record in opened(prepared, "blink/Spatial_Relation", "train"):
        (question,) = record["questions"]
        right = question["choices"]["AB".index(question["answer"][1])]
        scene = seen(record["images"][0], "free")
        assert answer(scene, question["question"]) == right
        words = question["question"].split()
        one, other = (
            next(thing for thing in scene.things if (thing.color, thing.shape) == pair)
            for pair in ((words[2], words[3]), (words[-2], words[-1].rstrip("?")))
        )
        opposite = {"left": "right", "right": "left", "above": "below", "below": "above"}[words[4]]
        assert holds(scene, one, words[4], other) != holds(scene, one, opposite, other)  # never level
        counts[right, question["answer"]] += 1
    assert counts == {("yes", "(A)"): 18, ("no", "(B)"): 18}


def fits(image, piece):
    """Whether with `piece` in its corner both seams show whole things: (right of the seam, below it)."""
    image = image.copy()
    image[56:, 56:] = piece
    large = range(66, 99)
    return [any(looks(image, *((56, place) if down else (place, 56))) for place in large) for down in (True, False)]


def test_jigsaw_pieces_can_be_told_by_their_seams(prepared):
    answers = collections.Counter()
    for record in opened(prepared, "blink/Jigsaw", "train"):
        (question,) = record["questions"]
        first, *pieces = map(pixels, record["images"])
        assert first.shape == (112, 112, 3) and [piece.shape for piece in pieces] == [(56, 56, 3)] * 2
        assert not first[56:, 56:].any() and first[:56].any(-1).all() and first[:, :56].any(-1).all()
        right = "AB".index(question["answer"][1])
        assert fits(first, pieces[right]) == [True, True]
        assert fits(first, pieces[1 - right]) in ([True, False], [False, True])
        assert question["choices"] == ["the second image", "the third image"]
        answers[right] += 1
    assert answers[0] == answers[1]


def shines(image):
    """The greys of a reflectance picture's tiles, after the light that explains it best."""
    grey = np.where((image == image[..., :1]).all(-1), image[..., 0], np.nan) / 255
    best = (np.inf, None)
    for share, turn in itertools.product(np.arange(0.1, 0.401, 0.01), range(4)):
        light = np.broadcast_to(1 - share * np.linspace(0, 1, 112), (112, 112))
        light = [light, light[:, ::-1], light.T, light.T[::-1]][turn]
        tiles = (grey / light).reshape(4, 28, 4, 28).transpose(0, 2, 1, 3).reshape(4, 4, -1)
        middle = np.nanmean(tiles, -1)
        error = np.nansum((tiles - middle[..., None]) ** 2)
        if error < best[0]:
            best = error, middle
    return best[1]


def test_relative_reflectance(prepared):
    answers = collections.Counter()
    for record in opened(prepared, "blink/Relative_Reflectance", "train")[:15]:
        (question,) = record["questions"]
        image = pixels(record["images"][0])
        greys = shines(image)
        red = (image == reflectance._RED).all(-1).reshape(4, 28, 4, 28).sum((1, 3))
        marked = [tuple(place) for place in np.argwhere(red)]
        assert len(marked) == 2
        # B has the more red of the two letters.
        a, b = sorted(marked, key=red.__getitem__)
        difference = greys[a] - greys[b]
        right = "about the same" if abs(difference) < 0.1 else f"{'A' if difference < 0 else 'B'} is darker"
        assert right == question["choices"]["ABC".index(question["answer"][1])]
        answers[right] += 1
    assert set(answers.values()) == {5}


def test_hidden_answers_and_columns_of_blink(prepared):
    for record in opened(prepared, "blink", "test"):
        (question,) = record["questions"]
        assert question["answer"] == "hidden"
        assert question["prompt"].startswith(question["question"])
        assert all(f"({letter}) {choice}" in question["prompt"] for letter, choice in zip("ABCD", question["choices"]))
    keys = [record["key"] for record in opened(prepared, "blink", "validation")]
    assert keys == [f"val_{task}_{i}" for task in sorted(_TASKS) for i in range(1, 13)]


_TASKS = ("Counting", "Jigsaw", "Relative_Reflectance", "Spatial_Relation")
# One pixel that tells a tile's kind, and its color.
_MARKS = {"H": ((14, 14), (24, 60, 110)), "S": ((14, 20), (40, 140, 60)), "G": ((7, 10), (214, 40, 40))}


def drawn(image):
    rows = []
    for y in range(0, image.shape[0], 28):
        kinds = ["F"] * (image.shape[1] // 28)
        for x, (kind, ((dx, dy), color)) in itertools.product(range(0, image.shape[1], 28), _MARKS.items()):
            if tuple(image[y + dy, x + dx]) == color:
                kinds[x // 28] = kind
        rows.append("".join(kinds))
    return rows


def test_a_way_is_drawn_only_into_a_map_with_a_start():
    assert drawn(np.asarray(mazes.draw(["SF", "FG"]))) == ["SF", "FG"]
    with pytest.raises(ValueError):
        mazes.draw(["FF", "FG"], "R,D")


def test_mazes(prepared):
    maps = {}
    for split in SIZES["vsp"]:
        found = opened(prepared, "vsp", split)
        assert [record["key"] for record in found] == [
            f"level{level}/{i}" for level in (3, 4, 5, 6) for i in range(SIZES["vsp"][split])
        ]
        maps[split] = {tuple(record["questions"][0]["map"]) for record in found}
        assert len(maps[split]) == len(found)
        for record in found:
            (question,) = record["questions"]
            image = pixels(record["images"][0])
            assert drawn(image) == question["map"]
            way = question["answer"].removeprefix("\\boxed{").removesuffix("}").split(",")
            tiles = {(r, c): kind for r, row in enumerate(question["map"]) for c, kind in enumerate(row)}
            place, steps = next(place for place, kind in tiles.items() if kind == "S"), []
            for move in way:
                place = tuple(np.add(place, MOVES[move]).tolist())
                steps.append(tiles[place])
            assert steps[-1] == "G" and "H" not in steps and len(way) >= 2
            assert ("helper_images" in record) == (split != "test")
            if split != "test":
                changed = (pixels(record["helper_images"][0]) != image).any(-1)
                touched = changed.reshape(-1, 28, image.shape[1] // 28, 28)
                assert touched.any((1, 3)).sum() == len(way) + 1  # every tile of the way and no other
    assert not maps["train"] & maps["test"] and not maps["train"] & maps["validation"]
    assert not maps["test"] & maps["validation"]


@pytest.mark.parametrize("name", SIZES)
def test_same_seed_same_bytes_and_sizes_do_not_matter(prepared, tmp_path, name):
    benchmarks.write(name, tmp_path / "again", seed=3, sizes=SIZES[name])
    benchmarks.write(name, tmp_path / "alone", seed=3, sizes={"test": SIZES[name]["test"]})
    benchmarks.write(name, tmp_path / "other", seed=4, sizes={"test": SIZES[name]["test"]})
    raw = prepared / name / "raw" / name

    def crc(folder):
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        return {str(path.relative_to(folder)): zlib.crc32(path.read_bytes()) for path in files}

    assert crc(raw) == crc(tmp_path / "again")
    tests = {file for file in crc(raw) if "test" in file}
    alone, other = crc(tmp_path / "alone"), crc(tmp_path / "other")
    assert tests and all(crc(raw)[file] == alone[file] for file in tests)
    assert any(other.get(file) != alone[file] for file in tests)


def test_bad_sizes_are_named(tmp_path):
    for sizes, said in (({"dev": 3}, "no split 'dev'"), ({"train": 0}, "train of 0 records")):
        with pytest.raises(UserError, match=said):
            build_scenes_benchmark("blink", tmp_path / "x", sizes=sizes)
    assert not list(tmp_path.iterdir())


def test_each_form_is_made_alone_on_first_use(tmp_path, monkeypatch):
    monkeypatch.setenv("LATENT_JAX_CACHE", str(tmp_path))
    monkeypatch.setitem(scenes.BENCHMARK_SIZES, "vsp", {"train": 2, "test": 1})
    assert len(sources.open_source("scenes_vsp", "", "train")) == 2 * 4
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith("scenes_vsp-") and folder.name.endswith("-2-1")
    assert sorted(path.name for path in folder.iterdir()) == ["raw", "vsp"]
    assert set(sources.split_names("scenes_vsp", "")) == {"train", "test"}
    assert json.loads((folder / "raw/vsp/test_direct.jsonl").read_text().splitlines()[0])["map_id"] == "0"


def test_the_background_is_no_thing():
    blank = np.broadcast_to(np.array(BACKGROUND), (112, 112, 3))
    assert not looks(blank, 56, 56) and len(SPRITES) == len(world.COMBINATIONS) * len(world.SIZES)
