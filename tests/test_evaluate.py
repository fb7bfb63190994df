"""The evaluation job with a backend that is no model: what it asks, writes, resumes and refuses."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from latent_jax import evaluate, main
from latent_jax.benchmarks import gqa
from latent_jax.config import schema
from latent_jax.data.builders.build import build_scenes
from latent_jax.errors import UserError
from latent_jax.evaluate import Backend
from tests.reference import benchmark_records as records
from tests.reference import scorers

PIXELS = {"name": "fake", "min_pixels": 1, "max_pixels": 2}
REPLIES = {"gqa": "Red.", "scienceqa": "A", "blink": "(A)", "vstar": "A", "mmvp": "(a)", "vsp": "Action plan: D,D,R,R"}


class Fake:
    """Answers from a rule, remembers what it was asked, and stops the process's work after `batches` batches."""

    def __init__(self, rule=lambda prompt: "Red.", batches: int | None = None):
        self.rule, self.left, self.asked, self.sizes = rule, batches, [], []

    def __call__(self, config) -> Backend:
        return Backend(self.answer, dict(PIXELS))

    def answer(self, conversations, max_new_tokens):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left = None if self.left is None else self.left - 1
        self.sizes.append(len(conversations))
        self.asked += [(turns[0]["content"], max_new_tokens) for turns in conversations]
        return [self.rule(turns[0]["content"][-1]["text"]) for turns in conversations]


@pytest.fixture
def data(monkeypatch):
    """Puts records in the place of prepared datasets: data(records, splits)."""

    def put(made: list[dict], splits=("testdev",)):
        monkeypatch.setattr(evaluate.sources, "split_names", lambda name, path: list(splits))
        monkeypatch.setattr(evaluate.sources, "open_source", lambda name, path, split: made)
        monkeypatch.setattr(evaluate.sources, "fingerprint", lambda name, path, split: "records")
        return made

    return put


def config(benchmark: str = "gqa", **changes):
    made = schema.default_evaluation()
    made.benchmark, made.data.path, made.log.progress = benchmark, "there", False
    schema.override(made, [(key.replace("__", "."), str(value)) for key, value in changes.items()])
    return schema.resolve(made)


def lines(workdir: Path) -> list[dict]:
    found = [json.loads(line) for line in (workdir / "predictions.jsonl").read_text().splitlines()]
    assert all(isinstance(line.pop("sum"), int) for line in found)
    return found


def error(*arguments) -> str:
    with pytest.raises(UserError) as caught:
        evaluate.run(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def by_colour(prompt: str) -> str:
    return ["red", "Blue", "green.", "A dog", ""][sum(map(ord, prompt)) % 5]


def test_what_is_asked_and_what_is_left(data, tmp_path, capsys):
    made, fake = data(records.gqa()), Fake(by_colour)
    found = evaluate.run(config(evaluate__batch_size=4), tmp_path, fake)
    asked = {q["id"]: q for record in made for q in record["questions"]}
    assert fake.sizes == [4, 4, 4, 4, 2]
    content, tokens = fake.asked[4]
    text = "What color is thing 1 of 1?\nAnswer the question using a single word or phrase."
    assert (
        content == [{"type": "image", "image": made[1]["images"][0]}, {"type": "text", "text": text}] and tokens == 16
    )

    assert [line["id"] for line in lines(tmp_path)] == list(asked)
    assert lines(tmp_path)[4] == {
        "id": "11",
        "prompt": text,
        "reply": by_colour(text),
        "parsed": gqa.parse(by_colour(text), {}, "official"),
        "answer": "green",
        "correct": scorers.gqa_right(asked["11"], by_colour(text), "official"),
        "cluster": "1",
    }
    replies = {line["id"]: line["reply"] for line in lines(tmp_path)}
    expected = {name: float(100 * value) for name, value in scorers.gqa(asked, replies, "official").items()}
    assert found["metrics"] == expected and len(expected) == 5
    assert found == json.loads((tmp_path / "results.json").read_text())
    assert found["ci95"].keys() == found["metrics"].keys()
    assert (found["benchmark"], found["split"], found["scorer"], found["n"]) == ("gqa", "testdev", "official", 18)
    assert (found["min_pixels"], found["max_pixels"], found["backend"]) == (1, 2, PIXELS)
    assert found["prompt"] == "{question}\nAnswer the question using a single word or phrase."
    assert found["decoding"] == {"strategy": "greedy", "repetition_penalty": 1.0, "max_new_tokens": 16}
    assert found["unparsed"] == sum(not line["reply"] for line in lines(tmp_path)) > 0
    assert found["throughput"]["items"] == 18 and "jax" in found["versions"]
    assert len(json.loads((tmp_path / "gqa_predictions.json").read_text())) == 18
    assert re.search(r"gqa testdev, official scorer: 18 questions\n  accuracy +\d+\.\d\d ± \d", capsys.readouterr().out)


@pytest.mark.parametrize("benchmark", records.EVERY)
def test_every_benchmark_from_record_to_results(benchmark, data, tmp_path):
    made = data(records.EVERY[benchmark](), ["test"])
    found = evaluate.run(config(benchmark), tmp_path, Fake(lambda prompt: REPLIES[benchmark]))
    assert found["n"] == sum(len(record["questions"]) for record in made) == len(lines(tmp_path))
    assert all(0 <= value <= 100 for value in found["metrics"].values()) and any(found["metrics"].values())
    assert all(isinstance(line["correct"], bool) for line in lines(tmp_path))
    assert all(line["parsed"] is not None for line in lines(tmp_path))


def test_images_come_before_the_prompt_in_order(data, tmp_path):
    made, fake = data(records.blink(), ["test"]), Fake(lambda prompt: "A")
    evaluate.run(config("blink"), tmp_path, fake)
    for record, (content, _) in zip(made, fake.asked, strict=True):
        assert [part["image"] for part in content[:-1]] == record["images"]


# ---------------------------------------------------------------- kills


def finished(directory: Path) -> tuple[str, dict]:
    found = json.loads((directory / "results.json").read_text())
    return (directory / "predictions.jsonl").read_text(), {key: found[key] for key in found if key != "throughput"}


def test_a_stopped_evaluation_goes_on_and_asks_nothing_twice(data, tmp_path):
    data(records.gqa())
    whole = Fake(by_colour)
    evaluate.run(config(evaluate__batch_size=4), tmp_path / "whole", whole)
    first, second = Fake(by_colour, batches=2), Fake(by_colour)
    with pytest.raises(KeyboardInterrupt):
        evaluate.run(config(evaluate__batch_size=4), tmp_path / "killed", first)
    with open(tmp_path / "killed" / "predictions.jsonl", "a") as file:
        file.write('{"id": "22", "prompt": "What col')  # a kill in the middle of a write
    evaluate.run(config(evaluate__batch_size=3), tmp_path / "killed", second)
    assert [*first.asked, *second.asked] == whole.asked
    assert finished(tmp_path / "killed") == finished(tmp_path / "whole")

    third = Fake()
    throughput = evaluate.run(config(), tmp_path / "killed", third)["throughput"]
    assert third.asked == [] and finished(tmp_path / "killed") == finished(tmp_path / "whole")
    assert throughput["items"] == 10


def test_a_longer_evaluation_keeps_the_shorter_ones_replies(data, tmp_path):
    data(records.gqa())
    assert evaluate.run(config(evaluate__examples=5), tmp_path, Fake())["n"] == 5
    fake = Fake()
    assert evaluate.run(config(), tmp_path, fake)["n"] == 18 and len(fake.asked) == 13
    assert "question 12 is not one of the 5 that are asked now" in error(config(evaluate__examples=5), tmp_path, fake)


# Begins a program of its own: 120 questions in the place of prepared data.
STAND_IN = """
import sys, time
from latent_jax import evaluate
from latent_jax.config import schema
from latent_jax.evaluate import Backend
from tests.reference import benchmark_records as records

evaluate.sources.split_names = lambda name, path: ["testdev"]
evaluate.sources.open_source = lambda name, path, split: records.gqa(40)
evaluate.sources.fingerprint = lambda name, path, split: "records"
config = schema.default_evaluation()
config.data.path, config.evaluate.batch_size = "there", 2
"""
SCRIPT = f"""{STAND_IN}
def answer(conversations, tokens):
    time.sleep(0.02)
    with open(sys.argv[2], "a") as file:
        file.writelines(turns[0]["content"][-1]["text"].splitlines()[0] + "\\n" for turns in conversations)
    return ["red"] * len(conversations)

evaluate.run(schema.resolve(config), sys.argv[1], lambda c: Backend(answer, dict(min_pixels=1, max_pixels=2)))
"""


def test_sigkill(tmp_path):
    """Killed for real in the middle; at most the batch under way is asked again, and none is scored twice."""
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "run"), str(tmp_path / "asked")]
    predictions = tmp_path / "run" / "predictions.jsonl"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (predictions.exists() and predictions.read_bytes().count(b"\n") > 20) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "run" / "results.json").exists()
    done = predictions.read_bytes().count(b"\n")
    assert 20 < done < 120
    subprocess.run(command, check=True, capture_output=True)
    assert len({line["id"] for line in lines(tmp_path / "run")}) == len(lines(tmp_path / "run")) == 120
    assert len((tmp_path / "asked").read_text().splitlines()) - 120 <= 2


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: [*found[:2], "oops", *found[2:]], "predictions.jsonl:3: expected a JSON object with id"),
        (lambda found: [*found, found[0]], "predictions.jsonl:19: question 00 stands here a second time"),
        (lambda found: [found[0].replace('"00"', '"99"')], "predictions.jsonl:1: question 99 is not one of the 18"),
        (lambda found: [found[0].replace("What", "Which")], "question 00 has prompt 'Which color"),
        (lambda found: [found[0].replace('"parsed": "red"', '"parsed": "blue"')], "has parsed 'blue', expected 'red'"),
        (lambda found: [found[0].replace('"correct": true', '"correct": false')], "has correct False, expected True"),
    ],
)
def test_predictions_of_another_evaluation(change, message, data, tmp_path):
    data(records.gqa())
    evaluate.run(config(), tmp_path, Fake())
    file = tmp_path / "predictions.jsonl"
    file.write_text("".join(line + "\n" for line in change(file.read_text().splitlines())))
    before = file.read_text()
    assert message in error(config(), tmp_path, Fake())
    assert file.read_text() == before


def test_questions_that_cannot_be_asked_are_skipped_told_and_listed(data, tmp_path, capsys):
    made = data(records.scienceqa(40), ["test"])
    made[3]["questions"][0]["id"] = "2"
    made[5]["questions"][0]["answer"] = 3
    found = evaluate.run(config("scienceqa", data__max_bad=0.06), tmp_path, Fake(lambda prompt: "A"))
    told = capsys.readouterr().err
    first = "scienceqa test, record 3, question 2: has the id of an earlier question"
    second = "scienceqa test, record 5, question 5: its answer 3 is not one of the 3 choices"
    assert f"skipped: {first}\n" in told and f"skipped: {second}\n" in told
    assert "skipped 2 of 40 questions; they are listed in results.json" in told
    assert "scienceqa test has 4,241 questions as published, here are 38" in told
    assert found["skipped"] == {"count": 2, "first": [first, second]} and found["n"] == 38
    said = error(config("scienceqa", data__max_bad=0.04), tmp_path / "other", Fake())
    assert said.startswith(f"{first}; so 2 of 40 questions, more than config.data.max_bad = 0.04")
    assert not (tmp_path / "other").exists()


def test_a_file_of_another_version(data, tmp_path):
    for record in data(records.blink(), ["test"]):
        del record["questions"][0]["choices"]
    said = error(config("blink"), tmp_path, Fake())
    assert said.startswith("blink test, record b0, question val_Jigsaw_0: has no 'choices'; so 6 of 6 questions")
    assert said.endswith("expected blink in its official form, is this another version?")
    data([records.record("x", [])], ["test"])
    assert error(config("blink"), tmp_path, Fake()) == "blink test: holds no question; expected blink's"


def test_hidden_answers_give_predictions_and_no_score(data, tmp_path, capsys):
    data(records.blink(answer="hidden"), ["test"])
    found = evaluate.run(config("blink"), tmp_path, Fake(lambda prompt: "(B)"))
    assert (found["n"], found["asked"], found["hidden_answers"]) == (0, 6, 6)
    assert found["metrics"] == found["ci95"] == {}
    assert all((line["answer"], line["correct"], line["parsed"]) == (None, None, "(B)") for line in lines(tmp_path))
    assert json.loads((tmp_path / "blink_predictions.json").read_text())["val_Jigsaw_0"] == "(B)"
    said = capsys.readouterr()
    assert "6 of 6 answers are hidden: those replies are kept and not scored" in said.err
    assert "0 questions could be scored, the answers are hidden" in said.out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluate__scorer": "lmms_eval"}, r"config\.evaluate\.scorer \('official' -> 'lmms_eval'\)"),
        ({"evaluate__max_new_tokens": 3}, r"config\.evaluate\.max_new_tokens \(0 -> 3\)"),
        ({"model__path": "x"}, r"config\.model\.path \('' -> 'x'\)"),
        ({"data__max_pixels": 9999}, r"config\.data\.max_pixels \(0 -> 9999\)"),
    ],
)
def test_a_workdir_of_another_config(changes, message, data, tmp_path):
    data(records.gqa())
    evaluate.run(config(), tmp_path, Fake())
    assert re.search(message, error(config(**changes), tmp_path, Fake()))


def test_a_workdir_of_another_job_or_backend(data, tmp_path):
    data(records.gqa())
    schema.write(schema.resolve(schema.default()), tmp_path / "train" / "config.json")
    assert error(config(), tmp_path / "train", Fake()) == (
        "this workdir is of the job 'train', not 'evaluate'; use a new --workdir"
    )
    evaluate.run(config(evaluate__examples=4), tmp_path / "run", Fake())
    other = lambda config: Backend(Fake().answer, {**PIXELS, "name": "other"})
    assert "was begun with name = 'fake', now it is 'other'" in error(config(), tmp_path / "run", other)
    assert len(lines(tmp_path / "run")) == 4


def test_which_split(data, tmp_path):
    data(records.gqa(), ["train", "validation", "testdev"])
    assert evaluate.run(config(), tmp_path / "a", Fake())["split"] == "testdev"
    assert evaluate.run(config(data__split="train"), tmp_path / "b", Fake())["split"] == "train"
    data(records.gqa(), ["challenge"])
    assert evaluate.run(config(), tmp_path / "c", Fake())["split"] == "challenge"
    data(records.gqa(), ["train", "challenge"])
    assert error(config(), tmp_path / "d", Fake()) == (
        "config.data.split: gqa has train, challenge; say which one is evaluated"
    )


def test_another_prompt(data, tmp_path):
    data(records.gqa())
    fake = Fake()
    found = evaluate.run(config(evaluate__prompt="Q: {question} A:", evaluate__examples=1), tmp_path / "a", fake)
    assert fake.asked[0][0][-1]["text"] == lines(tmp_path / "a")[0]["prompt"] == "Q: What color is thing 0 of 0? A:"
    assert found["prompt"] == "Q: {question} A:"
    evaluate.run(config(evaluate__prompt="{prompt} {question}", evaluate__examples=1), tmp_path / "b", fake)
    assert fake.asked[1][0][-1]["text"] == (
        "What color is thing 0 of 0?\nAnswer the question using a single word or phrase. What color is thing 0 of 0?"
    )


def test_choices_file(data, tmp_path):
    made = data(records.gqa())
    names = [q["id"] for record in made for q in record["questions"]]
    file = tmp_path / "choices.json"
    file.write_text(json.dumps({name: {"valid": ["red"], "plausible": []} for name in names}))
    found = evaluate.run(config(evaluate__choices=file), tmp_path / "run", Fake())
    assert (found["metrics"]["validity"], found["metrics"]["plausibility"]) == (100, 0)
    file.write_text("{}")
    assert f"{file}: choices has no" in error(config(evaluate__choices=file), tmp_path / "run", Fake())
    assert "no such file" in error(config(evaluate__choices="nowhere"), tmp_path / "run", Fake()).lower()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"benchmark": "gqua"},
            "config.benchmark: got 'gqua', expected one of blink, gqa, mmvp, scienceqa, vsp, vstar",
        ),
        ({"evaluate__scorer": "lmms"}, "config.evaluate.scorer: got 'lmms', expected one of official, lmms_eval"),
        ({"benchmark": "vsp", "evaluate__scorer": "lmms_eval"}, "got 'lmms_eval', expected one of official for vsp"),
        ({"benchmark": "vsp", "evaluate__choices": "x"}, "config.evaluate.choices: vsp has no choices file"),
        ({"evaluate__batch_size": 0}, "config.evaluate.batch_size: got 0, expected an integer >= 1"),
        ({"train__steps": 3}, "config.train.steps: no such key"),
        ({"job": "train"}, "config.job: a config file fixes its job ('evaluate')"),
    ],
)
def test_config_errors(changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        config(**changes)


def test_a_backend_that_forgets_a_question_is_no_backend(data, tmp_path):
    data(records.gqa())
    with pytest.raises(ValueError, match="1 replies to 16 conversations"):
        evaluate.run(config(), tmp_path, lambda config: Backend(lambda conversations, tokens: ["red"], dict(PIXELS)))
    assert (tmp_path / "predictions.jsonl").read_text() == ""


# ---------------------------------------------------------------- odd questions, other weights, damage


def test_a_question_that_cannot_be_sent_counts_as_wrong_and_ends_nothing(data, tmp_path, capsys):
    made = data(records.gqa())
    made[0]["questions"][0]["question"] = "What <|image_pad|> is it?"
    made[1]["questions"][0]["question"] = "What is it?\ud83d"
    made[2]["questions"][0]["question"] = "refused"
    fake = Fake()
    answer = fake.answer

    def refusing(conversations, tokens):
        if any("refused" in turns[0]["content"][-1]["text"] for turns in conversations):
            raise ValueError("an image of 900x4")
        return answer(conversations, tokens)

    opened = lambda config: Backend(refusing, dict(PIXELS))
    found = evaluate.run(config(data__max_bad=0.2), tmp_path / "a", opened)
    assert (found["n"], found["asked"], found["skipped"]["count"], found["skipped_as_wrong"]) == (18, 18, 3, 3)
    assert "3 questions could not be asked: 3 of them count as wrong" in capsys.readouterr().out
    again = Fake()
    assert evaluate.run(config(data__max_bad=0.2), tmp_path / "a", again)["metrics"] == found["metrics"]
    assert again.asked == []
    said = error(config(data__max_bad=0.1), tmp_path / "b", opened)
    assert said.startswith("gqa testdev, question 00: its text holds <|image_pad|>") and "3 of 18 questions" in said


def test_other_weights_are_refused_and_a_copy_is_not(data, tmp_path):
    data(records.gqa())
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"one")
    (model / "tokenizer.json").write_text("{}")
    found = evaluate.run(config(model__path=model, evaluate__examples=4), tmp_path / "run", Fake())
    assert found["weights"] == json.loads((tmp_path / "run" / "config.json").read_text())["measured"]["weights"]
    for file, other in (("model.safetensors", b"two"), ("tokenizer.json", b"[]")):
        earlier = (model / file).read_bytes()
        (model / file).write_bytes(other)
        assert "was begun with other weights" in error(config(model__path=model), tmp_path / "run", Fake())
        (model / file).write_bytes(earlier)
    assert evaluate.run(config(model__path=model), tmp_path / "run", Fake())["n"] == 18


@pytest.mark.parametrize("change", ["written anew", "another file", "a file gone"])
def test_a_model_that_changes_while_it_is_read_answers_nothing(change, data, tmp_path):
    """Its checksum would be that of other weights than those which reply."""
    data(records.gqa())
    model, fake = tmp_path / "model", Fake()
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"one")
    (model / "tokenizer.json").write_text("{}")

    def load(told):
        if change == "a file gone":
            (model / "tokenizer.json").unlink()
        else:
            (model / ("model.safetensors" if change == "written anew" else "vocab.json")).write_bytes(b"other")
        return fake(told)

    said = error(config(model__path=model), tmp_path / "run", load)
    assert str(model) in said and "changed while the model was being read; run the command again" in said
    assert not fake.asked and not (tmp_path / "run" / "config.json").exists()
    assert evaluate.run(config(model__path=model), tmp_path / "run", fake)["n"] == 18


def test_results_know_their_replies_in_whatever_order_they_came(data, tmp_path):
    data(records.gqa())
    found = evaluate.run(config(), tmp_path, Fake(by_colour))
    file = tmp_path / "predictions.jsonl"
    file.write_text("".join(reversed(file.read_text().splitlines(keepends=True))))
    assert evaluate.run(config(), tmp_path, Fake())["predictions"] == found["predictions"]
    other = evaluate.run(config(), tmp_path / "other", Fake())
    assert other["predictions"] != found["predictions"]


def test_a_flipped_bit_in_a_reply_is_named(data, tmp_path):
    data(records.gqa())
    evaluate.run(config(), tmp_path, Fake())
    file = tmp_path / "predictions.jsonl"
    file.write_text(file.read_text().replace('"reply": "Red."', '"reply": "Red.."', 1))
    assert "predictions.jsonl:1: is damaged" in error(config(), tmp_path, Fake())


# ---------------------------------------------------------------- the whole path


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes") / "prepared"
    build_scenes(folder, seed=3, sizes={"train": 2, "validation": 4})
    return folder


def test_the_command_from_prepared_files_to_results(prepared, tmp_path, monkeypatch, capsys):
    """The embedded model, once as published prompts ask and once with the bare question that it was trained on."""
    official = json.loads((prepared / "raw/gqa/questions/validation_balanced_questions.json").read_text())
    for workdir, extra in (("official", []), ("bare", ["--config.evaluate.prompt={question}"])):
        arguments = ["--config=configs/evaluate.py", "--config.benchmark=gqa", f"--config.data.path={prepared}", *extra]
        monkeypatch.setattr(sys, "argv", ["main", *arguments, f"--workdir={tmp_path / workdir}"])
        monkeypatch.delitem(sys.modules, "config_config", raising=False)
        main.main()
        found = json.loads((tmp_path / workdir / "results.json").read_text())
        assert [line["id"] for line in lines(tmp_path / workdir)] == list(official)
        replies = {line["id"]: line["reply"] for line in lines(tmp_path / workdir)}
        expected = scorers.gqa(official, replies, "official")
        metrics = {name: value for name, value in found["metrics"].items() if name in expected}
        assert metrics == {name: float(100 * value) for name, value in expected.items()}
        assert (found["dataset"], found["split"], found["model"]) == ("gqa", "validation", "tiny_vl")
    assert found["metrics"]["accuracy"] > 30, "the embedded model answers about half of its questions"
    assert "gqa: " in capsys.readouterr().err


def test_an_evaluations_config_comes_back_equal(tmp_path):
    made = config("blink", data__max_pixels=50176)
    schema.write(made, tmp_path / "config.json", {"backend": PIXELS})
    assert schema.read(tmp_path / "config.json") == (made, {"backend": PIXELS})
    assert "--config.benchmark=blink\n" in schema.describe(made)
