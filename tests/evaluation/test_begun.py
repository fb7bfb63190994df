"""An evaluation that goes on: only where replies are given as the earlier ones were; signals; damage of its workdir."""

import json
import os
import random
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
from latent_jax.errors import Stopped, UserError
from latent_jax.evaluate import Backend
from latent_jax.evaluation import answering
from latent_jax.evaluation.paired import compare
from latent_jax.models import hf_io
from tests.faults.inject import injure
from tests.reference import benchmark_records as records
from tests.reference.stub_facade import Facade
from tests.test_evaluate import PIXELS, REPLIES, STAND_IN, Fake, by_colour, config, error, finished, lines


@pytest.fixture
def asked_of(monkeypatch):
    """asked_of(records, fingerprint): puts them in the place of a prepared dataset."""

    def put(made: list[dict], fingerprint: str = "records"):
        monkeypatch.setattr(evaluate.sources, "split_names", lambda name, path: ["test"])
        monkeypatch.setattr(evaluate.sources, "open_source", lambda name, path, split: made)
        monkeypatch.setattr(evaluate.sources, "fingerprint", lambda name, path, split: fingerprint)

    return put


def as_of_before(workdir: Path, **measured) -> None:
    """Makes the workdir one of a version that kept the backend's settings alone, and what `measured` says."""
    found = json.loads((workdir / "config.json").read_text())
    found.pop("checksum")
    found["measured"] = {"backend": found["measured"]["backend"], **measured}
    (workdir / "config.json").write_text(json.dumps(found))


def half(workdir: Path, benchmark: str, count: int = 3, **changes) -> None:
    changes = {"evaluate__examples": count, **changes}
    evaluate.run(config(benchmark, **changes), workdir, Fake(lambda prompt: REPLIES[benchmark]))
    (workdir / "results.json").unlink()


# ---------------------------------------------------------------- otherwise than before


@pytest.mark.parametrize(
    ("benchmark", "scorer", "earlier"),
    [
        ("blink", "official", 64),
        ("blink", "lmms_eval", 64),
        ("scienceqa", "official", 16),
        ("vsp", "official", 128),
        ("scienceqa", "lmms_eval", None),
        ("gqa", "official", None),
        ("mmvp", "official", None),
        ("vstar", "lmms_eval", None),
    ],
)
def test_half_an_evaluation_of_before_reply_limits_were_kept(benchmark, scorer, earlier, asked_of, tmp_path):
    asked_of(records.EVERY[benchmark]())
    scored = dict(evaluate__scorer=scorer)
    half(tmp_path, benchmark, **scored)
    as_of_before(tmp_path)
    fake = Fake(lambda prompt: REPLIES[benchmark])
    if earlier:
        said = error(config(benchmark, **scored), tmp_path, fake)
        assert f"was begun with replies of at most {earlier} tokens, now it is" in said and fake.asked == []
        assert len(lines(tmp_path)) == 3
    else:
        assert evaluate.run(config(benchmark, **scored), tmp_path, fake)["n"] == len(lines(tmp_path)) >= 3


def test_a_limit_of_ones_own_is_known_without_having_been_kept(asked_of, tmp_path):
    asked_of(records.blink())
    half(tmp_path, "blink", evaluate__max_new_tokens=64)
    as_of_before(tmp_path)
    assert evaluate.run(config("blink", evaluate__max_new_tokens=64), tmp_path, Fake())["asked"] == 6


def test_no_reply_was_cut_where_there_is_none(asked_of, tmp_path):
    asked_of(records.blink())
    half(tmp_path, "blink")
    as_of_before(tmp_path)
    (tmp_path / "predictions.jsonl").write_text("")
    assert evaluate.run(config("blink"), tmp_path, Fake())["decoding"]["max_new_tokens"] == 1024


def test_a_limit_that_changed_since(asked_of, tmp_path, monkeypatch):
    asked_of(records.gqa())
    evaluate.run(config(), tmp_path, Fake())
    monkeypatch.setattr(gqa, "MAX_NEW_TOKENS", 128)
    # Finished or not: results.json would name a limit that the replies did not have.
    assert "was begun with replies of at most 16 tokens, now it is 128" in error(config(), tmp_path, Fake())


def test_a_prompt_that_changed_since(asked_of, tmp_path, monkeypatch):
    asked_of(records.gqa())
    half(tmp_path, "gqa")
    monkeypatch.setattr(gqa, "INSTRUCTION", "In a word.")
    said = error(config(), tmp_path, Fake())
    assert "predictions.jsonl:1: question 00 has prompt" in said and said.endswith("use a new --workdir")


def test_a_parser_that_changed_since(asked_of, tmp_path, monkeypatch):
    asked_of(records.gqa())
    half(tmp_path, "gqa")
    parse = gqa.parse
    monkeypatch.setattr(gqa, "parse", lambda reply, question, scorer: parse(reply, question, scorer).upper())
    assert "question 00 has parsed 'red', expected 'RED'" in error(config(), tmp_path, Fake())


def test_other_records_at_the_same_path(asked_of, tmp_path):
    """The questions are the same and the images are not: no line of the replies shows it."""
    asked_of(records.gqa())
    half(tmp_path, "gqa")
    asked_of(records.gqa(), "others")
    assert "was begun with other records of gqa at config.data.path='there'" in error(config(), tmp_path, Fake())
    asked_of(records.gqa())
    assert evaluate.run(config(), tmp_path, Fake())["n"] == 18
    asked_of(records.gqa(), "others")  # nothing is asked of them
    assert evaluate.run(config(), tmp_path, Fake())["n"] == 18


@pytest.mark.parametrize(
    ("latents", "change", "message"),
    [
        ("noise", {"seed": 1}, r"config\.seed \(0 -> 1\), on which replies to noise latents depend"),
        ("permuted", {"seed": 1}, r"config\.seed \(0 -> 1\), on which replies to permuted latents depend"),
        ("shuffled", {"seed": 1, "evaluate__batch_size": 4}, None),
        ("zero", {"seed": 1, "evaluate__batch_size": 4}, None),
    ],
)
def test_what_replies_to_interventions_depend_on(latents, change, message, asked_of, tmp_path):
    asked_of(records.gqa())
    imagined = dict(evaluate__imagine="true", evaluate__latents=latents)
    vlm = Facade({}, lambda text, given: False)
    answers = lambda _: Backend(vlm.generate, dict(PIXELS), vlm)
    evaluate.run(config(evaluate__examples=3, **imagined), tmp_path, answers)
    if message:
        assert re.search(message, error(config(**imagined, **change), tmp_path, answers))
    else:
        assert evaluate.run(config(**imagined, **change), tmp_path, answers)["n"] == 18


def test_interventions_of_an_earlier_version_do_not_go_on(asked_of, tmp_path):
    asked_of(records.gqa())
    vlm, told = Facade({}, lambda text, given: False), dict(evaluate__imagine="true", evaluate__latents="zero")
    answers = lambda _: Backend(vlm.generate, dict(PIXELS), vlm)
    evaluate.run(config(evaluate__examples=3, **told), tmp_path, answers)
    found = json.loads((tmp_path / "config.json").read_text())
    del found["checksum"], found["measured"]["replaced"]
    (tmp_path / "config.json").write_text(json.dumps(found))
    assert "was begun by a version that put other zero latents" in error(config(**told), tmp_path, answers)


def test_replies_of_nobody_knows_which_model(asked_of, tmp_path):
    asked_of(records.gqa())
    half(tmp_path, "gqa")
    (tmp_path / "config.json").unlink()
    assert "has replies and no config.json that says which model gave them" in error(config(), tmp_path, Fake())
    assert len(lines(tmp_path)) == 3 and not (tmp_path / "config.json").exists()


def test_other_versions_are_told(asked_of, tmp_path, capsys):
    asked_of(records.gqa())
    half(tmp_path, "gqa")
    found = json.loads((tmp_path / "config.json").read_text())
    found.pop("checksum")
    found["versions"]["jax"] = "0.1"
    (tmp_path / "config.json").write_text(json.dumps(found))
    evaluate.run(config(), tmp_path, Fake())
    assert re.search(r"not as this run began: jax 0\.1 -> \d.*; numbers may differ", capsys.readouterr().err)


# ---------------------------------------------------------------- latents of a model that has none


@pytest.mark.parametrize("kind", ["embedded", "folder", "workdir", "step", "cached", "hub"])
def test_no_latent_head_is_known_before_anything_is_loaded(kind, tmp_path, monkeypatch):
    import huggingface_hub

    path = {"embedded": "", "cached": "owner/name", "hub": "owner/name"}.get(kind, str(tmp_path / "model"))
    folder, listed = tmp_path / "model", ["model.safetensors", "config.json"]
    if kind in ("workdir", "step"):
        schema.write(schema.resolve(schema.default("sft")), folder / "config.json")
        (folder / "checkpoints" / "3").mkdir(parents=True)
        path += "/checkpoints/3" if kind == "step" else ""
    else:
        folder.mkdir()

    def snapshot(model, *, local_files_only=False, **_):
        assert local_files_only, "nothing is downloaded"
        if kind == "hub":
            raise FileNotFoundError(model)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda model: listed)
    monkeypatch.setattr(evaluate, "_load", lambda *_: pytest.fail("loaded"))
    monkeypatch.setattr(evaluate.questions, "open_data", lambda *_: pytest.fail("data opened"))
    told = config(evaluate__imagine="true", model__path=path)
    with pytest.raises(UserError) as caught:
        evaluate.run(told, tmp_path / "run")
    assert str(caught.value) == (
        f"config.evaluate.imagine: got true, but {path or 'tiny_vl'} has no latent head; expected a model of the "
        "method imagine"
    )
    assert not (tmp_path / "run").exists()

    listed.append(hf_io.LATENT_CONFIG)
    for method in ("imagine", "pretrain") if kind != "embedded" else ():
        if kind in ("folder", "cached"):
            (folder / hf_io.LATENT_CONFIG).write_text(json.dumps({"method": method}))
        if kind in ("workdir", "step"):
            schema.write(schema.resolve(schema.default(method)), folder / "config.json")
        assert answering.settled(told, tmp_path / "run", False)[0].evaluate.imagine is True
        left_open = config(model__path=path)
        if kind not in ("hub", "cached"):  # which would be downloaded
            found, said = answering.settled(left_open, tmp_path / "run", False)
            assert found.evaluate.imagine is (method == "imagine") and len(said) == (method == "pretrain")


def test_a_hub_that_does_not_answer_says_nothing_of_heads(monkeypatch):
    import huggingface_hub

    def offline(*_, **__):
        raise ConnectionError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", offline)
    assert answering.thinking("owner/name") is None and answering.thinking("no such/folder at all") is None


# ---------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_batch_under_way_and_the_next_start_goes_on(number, asked_of, tmp_path):
    asked_of(records.gqa())
    evaluate.run(config(evaluate__batch_size=4), tmp_path / "whole", Fake(by_colour))
    first, second = Fake(by_colour), Fake(by_colour)
    answer = first.answer

    def signalled(conversations, tokens):
        if len(first.asked) == 4:
            os.kill(os.getpid(), number)
        return answer(conversations, tokens)

    with pytest.raises(Stopped) as caught:
        evaluate.run(config(evaluate__batch_size=4), tmp_path / "run", lambda _: Backend(signalled, dict(PIXELS)))
    assert caught.value.code == 128 + number
    assert len(lines(tmp_path / "run")) == 8 and not (tmp_path / "run" / "results.json").exists()
    evaluate.run(config(evaluate__batch_size=4), tmp_path / "run", second)
    assert len(first.asked) + len(second.asked) == 18
    assert finished(tmp_path / "run") == finished(tmp_path / "whole")


def test_a_signal_in_the_last_batch_is_too_late(asked_of, tmp_path):
    asked_of(records.gqa())

    def signalled(conversations, tokens):
        os.kill(os.getpid(), signal.SIGTERM)
        return ["red"] * len(conversations)

    found = evaluate.run(config(evaluate__batch_size=18), tmp_path, lambda _: Backend(signalled, dict(PIXELS)))
    assert found["n"] == 18 and (tmp_path / "results.json").exists()


SCRIPT = f"""{STAND_IN}
from latent_jax.runtime.command import command

def answer(conversations, tokens):
    time.sleep(0.05)
    return ["red"] * len(conversations)

@command
def main():
    evaluate.run(schema.resolve(config), sys.argv[1], lambda c: Backend(answer, dict(min_pixels=1, max_pixels=2)))

main()
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_status_that_a_signal_leaves(number, status, tmp_path):
    predictions = tmp_path / "run" / "predictions.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "run")],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not (predictions.exists() and predictions.read_bytes().count(b"\n") > 5) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == status and "Traceback" not in said
    done = predictions.read_bytes()
    assert 5 < done.count(b"\n") < 120 and done.endswith(b"\n") and done.count(b"\n") % 2 == 0
    assert f"stopped after {done.count(bytes([10]))} of 120 questions; the same command goes on from there" in said


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize("name", ["config.json", "predictions.jsonl", "results.json"])
def test_an_injured_workdir_is_told_or_gives_the_same_results(name, asked_of, tmp_path):
    """Seeded injuries of a finished evaluation, and of one that is half done, by the same command again."""
    asked_of(records.gqa())
    whole = tmp_path / "whole"
    evaluate.run(config(), whole, Fake(by_colour))
    expected, told = finished(whole)[1], []
    for seed in range(60):
        place = tmp_path / str(seed)
        place.mkdir()
        for file in whole.iterdir():
            (place / file.name).write_bytes(file.read_bytes())
        draw = random.Random(seed)
        if seed % 2 and name != "results.json":
            (place / "results.json").unlink()
            kept = (place / "predictions.jsonl").read_text().splitlines(keepends=True)[: draw.randrange(1, 18)]
            (place / "predictions.jsonl").write_text("".join(kept))
        done = injure(place / name, draw)
        try:
            evaluate.run(config(), place, Fake(by_colour))
        except (UserError, OSError) as problem:  # the command says both in one line
            told.append(str(problem))
            assert "\n" not in told[-1] and (name in told[-1] or str(place) in told[-1] or "config." in told[-1]), done
            continue
        assert finished(place)[1] == expected, done
    # Results are written anew, where a file can stand.
    assert all("Is a directory" in line for line in told) if name == "results.json" else told


def test_results_that_were_changed_are_not_compared(asked_of, tmp_path):
    asked_of(records.gqa())
    for name in "ab":
        evaluate.run(config(), tmp_path / name, Fake())
    file = tmp_path / "b" / "results.json"
    file.write_text(file.read_text().replace('"n": 18', '"n": 28'))
    with pytest.raises(
        UserError, match=r"b/results\.json: is not what the evaluation wrote \(checksum\); run it again"
    ):
        compare(tmp_path / "a", tmp_path / "b")
    evaluate.run(config(), tmp_path / "b", Fake())
    assert compare(tmp_path / "a", tmp_path / "b")["difference"] == 0


def test_the_command_refuses_latents_of_the_embedded_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        sys,
        "argv",
        ["main", "--config=configs/evaluate.py", "--config.evaluate.imagine=true", f"--workdir={tmp_path / 'run'}"],
    )
    monkeypatch.delitem(sys.modules, "config_config", raising=False)
    with pytest.raises(SystemExit) as caught:
        main.main()
    assert caught.value.code == 2 and not (tmp_path / "run").exists()
    assert capsys.readouterr().err.startswith(
        "error: config.evaluate.imagine: got true, but tiny_vl has no latent head"
    )
