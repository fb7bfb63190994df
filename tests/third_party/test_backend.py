"""The same checkpoint through our backend and through stock transformers: the same replies, question for question."""

import json
import sys

import pytest

from latent_jax import evaluate
from latent_jax.config import schema
from latent_jax.errors import UserError
from tests.reference import benchmark_records as records
from tests.reference.checkpoints import saved
from third_party import backend
from third_party import evaluate as command
from third_party.families import open_processor
from third_party.processor import image_sources


def run(benchmark: str, made: list[dict], directory, monkeypatch, open_backend, model: str = "", **changes):
    monkeypatch.setattr(evaluate.sources, "split_names", lambda name, path: ["test"])
    monkeypatch.setattr(evaluate.sources, "open_source", lambda name, path, split: made)
    monkeypatch.setattr(evaluate.sources, "fingerprint", lambda name, path, split: "records")
    config = schema.default_evaluation()
    config.benchmark, config.data.path, config.model.path, config.log.progress = benchmark, "there", model, False
    config.evaluate.max_new_tokens, config.evaluate.batch_size = 12, 4
    config.data.update(changes)
    found = evaluate.run(schema.resolve(config), directory, open_backend)
    return found, (directory / "predictions.jsonl").read_text()


# A model that answers, on questions about an image; and random weights, whose replies are long, on several images, on
# text alone, and with other pixel limits.
CASES = {
    "tiny_vl": ("gqa", lambda: records.gqa(3, 2), None, {}),
    "several_images": ("blink", records.blink, "as_published", {}),
    "image_in_the_text": ("vsp", records.vsp, "as_published", {}),
    "no_image": ("scienceqa", records.scienceqa, "as_published", {}),
    "pixel_limits": ("vstar", records.vstar, "as_published", {"min_pixels": 112 * 112, "max_pixels": 140 * 140}),
}


@pytest.mark.parametrize("case", CASES)
def test_both_backends_give_the_same_predictions(case, tmp_path, monkeypatch):
    benchmark, make, name, changes = CASES[case]
    model = str(saved(name)[0]) if name else ""
    arguments = (monkeypatch, None, model), (monkeypatch, backend.open_backend, model)
    (ours, our_lines), (theirs, their_lines) = (
        run(benchmark, make(), tmp_path / str(i), *each, **changes) for i, each in enumerate(arguments)
    )
    assert our_lines == their_lines
    replies = {json.loads(line)["reply"] for line in our_lines.splitlines()}
    assert len(replies) > 1, "one reply to everything shows little"
    assert (ours["metrics"], ours["ci95"]) == (theirs["metrics"], theirs["ci95"])
    assert (ours["backend"]["name"], theirs["backend"]["name"]) == ("latent_jax", "transformers qwen2_5_vl")
    for key in ("min_pixels", "max_pixels"):
        assert ours[key] == theirs[key] == changes.get(key, ours[key])


def test_replies_do_not_depend_on_the_batch(tmp_path):
    processor = open_processor(saved("as_published")[0])
    turns = [
        [{"role": "user", "content": [*({"type": "image", "image": image} for image in record["images"]), text]}]
        for record in records.blink(3)
        for text in [{"type": "text", "text": record["questions"][0]["prompt"]}]
    ]
    model = saved("as_published")[1]
    together = backend.generate(model, processor, turns, 8)
    assert together == [backend.generate(model, processor, [each], 8)[0] for each in turns]


def test_what_no_baseline_knows():
    with pytest.raises(UserError, match="a 'imagine' part cannot be shown to a stock model"):
        image_sources([{"role": "user", "content": [{"type": "imagine", "text": "a red ball"}]}])


def test_a_family_that_is_not_there(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    config = schema.default_evaluation()
    config.model.path = str(tmp_path)
    with pytest.raises(UserError, match="model_type is 'gpt2', expected one of"):
        backend.open_backend(schema.resolve(config))


def test_the_command_takes_evaluations_only(capsys):
    with pytest.raises(SystemExit) as end:
        command.main(["--config=configs/pretrain.py"])
    assert end.value.code == 2 and "expected a config of the job 'evaluate'" in capsys.readouterr().err


def test_stock_models_imagine_nothing(capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "config_config", raising=False)
    with pytest.raises(SystemExit) as end:
        command.main(["--config=configs/evaluate.py", "--config.evaluate.imagine=true"])
    assert end.value.code == 2 and "config.evaluate.imagine: got true; stock models" in capsys.readouterr().err
