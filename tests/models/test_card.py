"""The model card: front matter that YAML reads, and a user's own README.md that is never lost."""

import pytest

from latent_jax.models import hf_export, hf_io
from latent_jax.models.card import Card
from latent_jax.models.qwen2_5_vl.config import from_json
from tests.models import tiny_hf

CARD = Card("Qwen/Qwen2.5-VL-3B-Instruct", "pretrain", "scenes (train)", 500, numbers={"recall": 0.5})


def test_the_front_matter_is_yaml():
    yaml = pytest.importorskip("yaml")
    front = yaml.safe_load(CARD.text(True).split("---\n")[1])
    assert front["base_model"] == "Qwen/Qwen2.5-VL-3B-Instruct" and front["library_name"] == "transformers"
    assert "latent_jax.load" in CARD.text(True) and "latent_jax.load" not in CARD.text(False)
    odd = Card('a"b: [\n', "sft", "x", 1, license={"license": 'c"d\n- e'})
    assert yaml.safe_load(odd.text(False).split("---\n")[1])["license"] == 'c"d - e'


def test_a_card_is_replaced_and_a_readme_of_ones_own_is_kept(tmp_path):
    made, out = tiny_hf.write(tmp_path / "made"), tmp_path / "out"

    def export(steps):
        card = Card("", "sft", "x", steps).text(False)
        hf_export.save(out, hf_io.load(made), from_json(made / "config.json"), source=made, card=card)
        return (out / "README.md").read_text()

    assert "11 steps" in export(11)
    assert "12 steps" in export(12)
    (out / "README.md").write_text("my own\n")
    hf_export.check_replaceable(out)
    assert export(13) == "my own\n"
