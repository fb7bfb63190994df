"""The procedural world: what its captions, questions and files promise, checked against slow readings of them."""

import collections
import json
import pathlib
import random
import re
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from reference.scene_answers import answer, holds, scene_of
from transformers import AutoImageProcessor, AutoTokenizer

from latent_jax.data import scenes
from latent_jax.data.scenes import tokenizer, world
from latent_jax.data.scenes.captions import captions, full
from latent_jax.data.scenes.questions import ANSWERS, TASKS, Asker
from latent_jax.data.scenes.render import render
from latent_jax.errors import UserError

OPTIONS = {"objects": (2, 4), "striped": 0.3}
SIZES = {"train": 40, "validation": 20, "test": 4, "compositional": 20}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    scenes.write(folder, seed=5, sizes=SIZES)
    return folder


def sampled(split, count, placement="grid", **options):
    for number in range(count):
        rng = random.Random(f"test {number}")
        yield world.sample(rng, split, placement=placement, **{**OPTIONS, **options}), rng


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), placement=st.sampled_from(world.PLACEMENTS), split=st.sampled_from(world.SPLITS))
def test_full_caption_determines_the_scene(seed, placement, split):
    rng = random.Random(seed)
    scene = world.sample(rng, split, placement=placement, **OPTIONS)
    assert captions(scene, rng)[0] == full(scene)
    assert scene_of(full(scene), placement) == scene


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), placement=st.sampled_from(world.PLACEMENTS))
def test_other_captions_are_true(seed, placement):
    rng = random.Random(seed)
    scene = world.sample(rng, "test", placement=placement, **OPTIONS)
    _, some, placed, chain = captions(scene, rng)
    for phrase in some.rstrip(".").split(" and "):
        words = set(phrase.split()) - {"a", "object"}
        assert any(words <= {thing.size, thing.color, thing.shape} for thing in scene.things)
    by_name = {(thing.color, thing.shape): thing for thing in scene.things}
    for phrase in placed.rstrip(".").split(", "):
        color, shape, row, column = re.fullmatch(r"a (\w+) (\w+) at (\w+) (\w+)", phrase).groups()
        x, y = scene.center(by_name[color, shape])
        assert (world.ROWS[y // 28], world.COLUMNS[x // 28]) == (row, column)
    parts = re.split(r" (left of|right of|above|below) ", chain.rstrip("."))
    named = [by_name[tuple(phrase.removeprefix("a ").replace("striped ", "").split())] for phrase in parts[::2]]
    assert len(named) == len(scene.things)
    for one, relation, other in zip(named, parts[1::2], named[1:]):
        assert holds(scene, one, relation.removesuffix(" of"), other)


@pytest.mark.parametrize("placement", world.PLACEMENTS)
@pytest.mark.parametrize("split", ["train", "compositional"])
def test_answers_are_those_of_the_scene(placement, split):
    asker, tasks = Asker(split), collections.Counter()
    for scene, rng in sampled(split, 80, placement):
        for draft in asker.ask(scene, rng):
            assert answer(scene, draft.question) == draft.answer, (draft, scene)
            assert draft.answer in draft.choices
            assert draft.answer in ANSWERS
            assert re.search(rf"\b{draft.answer}", draft.full_answer.lower()) or draft.answer in ("yes", "no")
            tasks[draft.task] += 1
    assert set(tasks) == set(TASKS)
    assert sum(tasks.values()) / 80 > 6


def test_the_words_of_a_question_do_not_give_its_answer():
    """The best guess from the exact wording (learned on train) is near chance on validation, for every task."""
    seen = collections.defaultdict(collections.Counter)
    asker = Asker("train")
    for scene, rng in sampled("train", 700, striped=0.0):
        for draft in asker.ask(scene, rng):
            seen[draft.question][draft.answer] += 1
    right, chance, count = collections.Counter(), collections.Counter(), collections.Counter()
    asker = Asker("validation")
    for scene, rng in sampled("validation", 200, striped=0.0):
        for draft in asker.ask(scene, rng):
            guess = max(seen[draft.question] or {draft.choices[0]: 1}, key=seen[draft.question].__getitem__)
            right[draft.task] += guess == draft.answer
            chance[draft.task] += 1 / len(draft.choices)
            count[draft.task] += 1
    for task in TASKS:
        assert right[task] - chance[task] < 0.05 * count[task] + 2 * np.sqrt(count[task] / 4), task
    assert sum(right.values()) - sum(chance.values()) < 0.03 * sum(count.values())


def test_splits_are_disjoint_and_combinations_held_out():
    texts = {split: {full(scene) for scene, _ in sampled(split, 150, striped=0.0)} for split in world.SPLITS}
    for one in world.SPLITS:
        for other in world.SPLITS:
            assert one == other or not texts[one] & texts[other]
    asker = Asker("train")
    for split in ("train", "validation", "test"):
        for scene, rng in sampled(split, 100):
            shown = {(thing.color, thing.shape) for thing in scene.things}
            assert not shown & world.HELD_OUT
            if split == "train":
                said = " ".join([*captions(scene, rng), *(draft.question for draft in asker.ask(scene, rng))])
                assert not any(f"{color} {shape}" in said for color, shape in world.HELD_OUT)
    for scene, _ in sampled("compositional", 100):
        assert {(thing.color, thing.shape) for thing in scene.things} & world.HELD_OUT


def test_what_a_thing_is_can_be_seen():
    """Every pair of different things gives different pixels, in its own cell and nowhere else."""
    looks = {}
    for shape in world.SHAPES:
        for color in world.COLORS:
            for size in world.SIZES:
                for material in world.MATERIALS:
                    thing = world.Thing(shape, color, size, material, 1, 2)
                    pixels = np.asarray(render(world.Scene((thing,), "grid"))).astype(int)
                    floor = pixels[0, 0]
                    where = np.argwhere((pixels != floor).any(-1))
                    assert where.min(0).tolist() >= [56, 28]
                    assert (where.max(0) < [84, 56]).all()
                    looks[shape, color, size, material] = pixels[56:84, 28:56]
    flat = np.stack(list(looks.values())).reshape(len(looks), -1)
    for i, pixels in enumerate(flat):
        assert (np.abs(flat[:i] - pixels).mean(1) > 1).all(), list(looks)[i]


def test_free_things_never_touch():
    for scene, _ in sampled("train", 200, "free", objects=(2, 6)):
        boxes = np.array([scene.center(thing) for thing in scene.things])
        gaps = np.abs(boxes[:, None] - boxes[None]).max(-1) + 999 * np.eye(len(boxes), dtype=int)
        assert gaps.min() >= 28


def test_same_seed_same_bytes_and_sizes_do_not_matter(written, tmp_path):
    scenes.write(tmp_path / "again", seed=5, sizes=SIZES)
    scenes.write(tmp_path / "other", seed=6, sizes={"validation": SIZES["validation"]})
    scenes.write(tmp_path / "alone", seed=5, sizes={"validation": SIZES["validation"]})
    files = sorted(path.relative_to(written) for path in written.rglob("*") if path.is_file())
    assert len(files) > 2 * sum(SIZES.values())
    for file in files:
        assert (written / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
        if "validation" in str(file):
            assert (written / file).read_bytes() == (tmp_path / "alone" / file).read_bytes()
    name = "gqa/questions/validation_balanced_questions.json"
    assert (written / name).read_bytes() != (tmp_path / "other" / name).read_bytes()


def test_files_have_the_official_forms(written):
    for split, size in SIZES.items():
        coco = json.loads((written / f"coco/annotations/captions_{split}.json").read_text())
        assert {"info", "licenses", "images", "annotations"} <= coco.keys()
        assert len(coco["images"]) == size
        assert len({annotation["id"] for annotation in coco["annotations"]}) == 4 * size
        questions = json.loads((written / f"gqa/questions/{split}_balanced_questions.json").read_text())
        graphs = json.loads((written / f"gqa/sceneGraphs/{split}_sceneGraphs.json").read_text())
        assert {int(image_id) for image_id in graphs} == {image["id"] for image in coco["images"]}
        for image in coco["images"]:
            picture = Image.open(written / "coco" / split / image["file_name"])
            assert picture.size == (image["width"], image["height"]) == (112, 112)
            copy = (written / "gqa" / "images" / f"{image['id']}.png").read_bytes()
            assert copy == (written / "coco" / split / image["file_name"]).read_bytes()
            check_graph(graphs[str(image["id"])], np.asarray(picture).astype(int))
        for question_id, question in questions.items():
            check_question(question_id, question, questions, graphs)
        file = written / f"gqa/eval/{split}_choices.json"
        assert file.exists() == (split != "train")
        choices = json.loads(file.read_text()) if file.exists() else {}
        for question_id, its in choices.items():
            assert questions[question_id]["answer"] in its["plausible"]
            assert set(its["plausible"]) <= set(its["valid"])
        assert not choices or choices.keys() == questions.keys()


def check_graph(graph, pixels):
    background = pixels[0, 55]  # between two cells: floor in the grid placement
    for object_id, thing in graph["objects"].items():
        x, y, w, h = (thing[key] for key in "xywh")
        assert (pixels[y : y + h, x : x + w] != background).any()
        for relation in thing["relations"]:
            other = graph["objects"][relation["object"]]
            assert relation["object"] != object_id
            dx, dy = other["x"] + other["w"] / 2 - x - w / 2, other["y"] + other["h"] / 2 - y - h / 2
            assert {"to the left of": dx, "to the right of": -dx, "above": dy, "below": -dy}[relation["name"]] > 0


def check_question(question_id, question, questions, graphs):
    assert question.keys() == {
        "semantic",
        "entailed",
        "equivalent",
        "question",
        "imageId",
        "isBalanced",
        "groups",
        "answer",
        "semanticStr",
        "annotations",
        "types",
        "fullAnswer",
    }
    assert question["types"].keys() == {"detailed", "semantic", "structural"}
    assert question["types"]["structural"] in {"query", "verify", "choose", "logical", "compare"}
    assert question["types"]["semantic"] in {"obj", "attr", "cat", "rel", "global"}
    assert question["groups"].keys() == {"global", "local"}
    objects = graphs[question["imageId"]]["objects"]
    for index, step in enumerate(question["semantic"]):
        assert step.keys() == {"operation", "dependencies", "argument"}
        assert all(dependency < index for dependency in step["dependencies"])
        for object_id in re.findall(r"\d{4,}", step["argument"]):
            assert object_id in objects
    for other in question["entailed"]:
        assert other != question_id
        assert questions[other]["imageId"] == question["imageId"]
        assert questions[other]["answer"] == "yes"
        assert question["answer"] in questions[other]["question"]


@pytest.mark.parametrize(
    "bad",
    [{"sizes": {"dev": 3}}, {"sizes": {"train": 0}}, {"placement": "ring"}, {"objects": (1, 4)}, {"striped": 2.0}],
)
def test_bad_arguments_are_named(tmp_path, bad):
    with pytest.raises(UserError, match="expected"):
        scenes.write(tmp_path / "x", **{"sizes": {"train": 1}, **bad})
    assert not (tmp_path / "x").exists()


# What the published template of Qwen2.5-VL renders, typed from the model card's example.
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
CHATS = [
    ([{"role": "user", "content": "Hi "}], {}, SYSTEM + "<|im_start|>user\nHi <|im_end|>\n"),
    (
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\nWhat?"}]}],
        {"add_generation_prompt": True},
        SYSTEM + "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>\nWhat?<|im_end|>\n"
        "<|im_start|>assistant\n",
    ),
    (
        [
            {"role": "system", "content": "S"},
            {
                "role": "user",
                "content": [
                    {"type": "video"},
                    {"type": "image_url", "image_url": "x"},
                    {"type": "image"},
                    {"type": "text", "text": "?"},
                ],
            },
            {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
        ],
        {"add_vision_id": True},
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nVideo 1: <|vision_start|><|video_pad|><|vision_end|>"
        "Picture 1: <|vision_start|><|image_pad|><|vision_end|>Picture 2: <|vision_start|><|image_pad|><|vision_end|>?"
        "<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n",
    ),
]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.write(folder)
    return folder


@pytest.fixture(scope="module")
def hf(tokenizer_folder):
    return AutoTokenizer.from_pretrained(tokenizer_folder)


@pytest.mark.parametrize(("messages", "options", "expected"), CHATS)
def test_chat_template(hf, messages, options, expected):
    assert hf.apply_chat_template(messages, tokenize=False, **options) == expected
    assert hf.decode(hf(expected).input_ids) == expected


def test_every_answer_is_one_token(hf):
    for word in ANSWERS:
        assert len(hf(word).input_ids) == 1
        assert word.isdecimal() or len(hf(f" {word}").input_ids) == 1
    assert hf.tokenize("You are a helpful assistant.") == ["You", "Ġare", "Ġa", "Ġhelpful", "Ġassistant", "."]
    asker = Asker("test")
    for scene, rng in sampled("test", 50, striped=0.0):
        caption = captions(scene, rng)[0]
        assert len(hf(caption).input_ids) == len(re.findall(r"\w+|[,.]", caption))
        for draft in asker.ask(scene, rng):
            assert len(hf(draft.question).input_ids) == len(re.findall(r"\w+|\?", draft.question))


@settings(max_examples=50, deadline=None)
@given(text=st.text(st.characters(codec="utf-8", exclude_categories=["Cs"])))
def test_tokens_give_the_text_back(hf, text):
    text = unicodedata.normalize("NFC", text)
    assert hf.decode(hf(text).input_ids) == text


def test_tokenizer_files(tokenizer_folder, hf, tmp_path):
    ids = tokenizer.write(tmp_path)
    shipped = pathlib.Path(scenes.__file__).parents[2] / "assets" / "tiny_vl"
    for file in tokenizer_folder.iterdir():
        assert file.read_bytes() == (tmp_path / file.name).read_bytes() == (shipped / file.name).read_bytes()
    assert sorted(ids.values()) == list(range(len(hf))) and len(ids) < 700
    assert all(hf.convert_tokens_to_ids(token) == index for token, index in ids.items())
    assert (hf.eos_token, hf.pad_token, hf.bos_token) == ("<|im_end|>", "<|endoftext|>", None)
    assert hf.decode(hf("<|im_start|><tool_call>x<|image_pad|>").input_ids, skip_special_tokens=True) == "<tool_call>x"
    hf_processor = AutoImageProcessor.from_pretrained(tokenizer_folder)
    features = hf_processor(images=[Image.new("RGB", (112, 112))], return_tensors="np")
    assert features["image_grid_thw"].tolist() == [[1, 8, 8]]
    generation = json.loads((tokenizer_folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [ids["<|im_end|>"], ids["<|endoftext|>"]]
