"""Odd records end no evaluation: each of their questions is skipped and counted, or asked as any other."""

import functools
import json

import pytest

from latent_jax import evaluate
from latent_jax.assets import TINY_VL
from latent_jax.config.evaluation import benchmarks
from latent_jax.data.chat import Processor
from latent_jax.errors import UserError
from latent_jax.evaluate import Backend
from tests.reference import benchmark_records as records
from tests.reference.odd_records import ODDITIES, image, odd
from tests.test_evaluate import PIXELS, REPLIES, config, lines

SEEDS = range(4)
MORE = range(4, 24)


@functools.cache
def processor() -> Processor:
    return Processor.from_directory(TINY_VL)


def backend(benchmark: str) -> Backend:
    """Renders and lays out as the real one does, images and all, and has no model behind it."""

    def answer(conversations, tokens):
        for messages in conversations:
            processor().lay_out(processor().render(messages, add_generation_prompt=True))
        return [REPLIES[benchmark]] * len(conversations)

    return Backend(answer, dict(PIXELS))


def put(monkeypatch, made: list[dict]) -> None:
    monkeypatch.setattr(evaluate.sources, "split_names", lambda name, path: ["test"])
    monkeypatch.setattr(evaluate.sources, "open_source", lambda name, path, split: made)
    monkeypatch.setattr(evaluate.sources, "fingerprint", lambda name, path, split: "records")


@pytest.mark.parametrize("seeds", [SEEDS, pytest.param(MORE, marks=pytest.mark.slow)])
@pytest.mark.parametrize("benchmark", benchmarks())
def test_odd_records_are_counted_and_change_no_other_question(benchmark, seeds, tmp_path, monkeypatch):
    whole = {q["id"] for record in records.EVERY[benchmark](12) for q in record["questions"]}
    put(monkeypatch, records.EVERY[benchmark](12))
    evaluate.run(config(benchmark), tmp_path / "whole", lambda _: backend(benchmark))
    expected = {line["id"]: line for line in lines(tmp_path / "whole")}
    assert expected.keys() == whole
    asked = 0
    for seed in seeds:
        made, touched = odd(benchmark, seed)
        scorer = {"evaluate__scorer": "lmms_eval"} if seed % 2 and benchmark != "vsp" else {}
        put(monkeypatch, made)
        place, told = tmp_path / str(seed), config(benchmark, data__max_bad=1, evaluate__batch_size=5, **scorer)
        found = evaluate.run(told, place, lambda _: backend(benchmark))
        given, left = lines(place), found["skipped"]["count"] - found["skipped_as_wrong"]
        assert len(given) == found["asked"], seed
        assert found["asked"] + left == sum(len(record["questions"]) for record in made), seed
        assert sum("skipped" in line for line in given) == found["skipped_as_wrong"], seed
        assert all(line["correct"] in (False, None) and not line["reply"] for line in given if "skipped" in line), seed
        assert all("\n" not in why and len(why) < 500 for why in found["skipped"]["first"]), seed
        by_id = {line["id"]: line for line in given}
        if not scorer:
            for at, record in enumerate(made):
                # An odd record that took this one's id stands before it, and the first one keeps it.
                for question in record["questions"] if at not in touched else ():
                    line = by_id[question["id"]]
                    stolen = any(
                        question["id"] == q.get("id")
                        for other in sorted(touched)
                        for q in made[other]["questions"]
                        if isinstance(q, dict)
                    )
                    assert stolen or line == expected[question["id"]], seed
        assert evaluate.run(told, place, lambda _: pytest.fail("asked twice")) == found, seed
        json.dumps(found, allow_nan=False)
        asked += found["asked"]
    assert asked > 5 * len(seeds)


@pytest.mark.parametrize("benchmark", benchmarks())
def test_more_odd_records_than_are_allowed_are_one_line(benchmark, tmp_path, monkeypatch):
    told = set()
    for seed in SEEDS:
        put(monkeypatch, odd(benchmark, seed)[0])
        try:
            evaluate.run(config(benchmark, data__max_bad=0.01), tmp_path / str(seed), lambda _: backend(benchmark))
        except UserError as problem:
            told.add(str(problem))
    assert len(told) > len(SEEDS) // 2
    assert all("\n" not in line and "more than config.data.max_bad = 0.01" in line for line in told)


def test_every_oddity_is_drawn():
    drawn = dict.fromkeys(ODDITIES, 0)

    def counted(oddity):
        def apply(draw, made, at):
            drawn[oddity] += 1
            oddity(draw, made, at)

        return apply

    for seed in MORE:
        odd("gqa", seed, oddities=[counted(oddity) for oddity in ODDITIES])
    assert min(drawn.values()) > 5


@pytest.mark.slow
@pytest.mark.parametrize("benchmark", benchmarks())
def test_odd_images_before_the_embedded_model(benchmark, tmp_path, monkeypatch):
    put(monkeypatch, odd(benchmark, 1, oddities=(image,))[0])
    found = evaluate.run(config(benchmark, data__max_bad=1, evaluate__max_new_tokens=4), tmp_path)
    assert found["asked"] == len(lines(tmp_path)) and found["skipped_as_wrong"] < found["asked"]
