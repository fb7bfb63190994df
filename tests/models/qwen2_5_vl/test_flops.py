"""The FLOP ledger against hand counts, a brute-force count of attended pairs and XLA's own cost analysis."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from latent_jax.config import schema
from latent_jax.config.training import PRESETS
from latent_jax.methods import sft
from latent_jax.models.heads import LatentVLM
from latent_jax.models.parameters import Structure
from latent_jax.models.qwen2_5_vl import flops
from latent_jax.models.qwen2_5_vl.config import from_json
from latent_jax.models.qwen2_5_vl.model import Qwen2_5_VL
from tests.reference.ours import QUICK

TINY = from_json(PRESETS / "tiny.json")
NOTHING = flops.Work(tokens=0, supervised=0, pairs=0.0, patches=0, window_pairs=0, image_pairs=0, channels=588)
SOME = flops.Work(tokens=1000, supervised=900, pairs=5e5, patches=32, window_pairs=512, image_pairs=1024, channels=588)


def batch(segments, views, windows, images, weights=None, channels=588):
    segments, views = np.array(segments, np.int32), np.array(views, np.int32)
    windows, images = np.array(windows, np.int32), np.array(images, np.int32)
    return {
        "segment_ids": segments, "view_ids": views, "patch_window": windows, "patch_image": images,
        "loss_weights": np.ones(segments.shape, np.float32) if weights is None else np.array(weights, np.float32),
        "patches": np.zeros((*images.shape, channels), np.uint8),
    }  # fmt: skip


def test_count_against_brute_force():
    rng = np.random.default_rng(0)
    segments = np.sort(rng.integers(0, 4, (2, 3, 24)), axis=-1)
    views = np.where(segments > 0, rng.integers(0, 3, segments.shape), 0)
    images = np.sort(rng.integers(0, 3, (2, 16)), axis=-1)
    windows = np.where(images > 0, images * 4 + rng.integers(0, 4, images.shape), 0)
    weights = rng.integers(0, 2, segments.shape)
    work = flops.count(batch(segments, views, windows, images, weights))

    pairs = 0.0
    for segment, view in zip(segments.reshape(-1, 24), views.reshape(-1, 24)):
        for q in range(24):
            for k in range(24):
                if segment[q] == segment[k] > 0:
                    # The same stretch: every pair counts half. A view's query and a trunk's key: it counts.
                    pairs += 0.5 if view[q] == view[k] else float(view[k] == 0)
    assert work.pairs == pairs
    assert work.tokens == (segments > 0).sum() and work.supervised == weights.sum()
    assert work.patches == (images > 0).sum()
    assert work.image_pairs == sum((a == b) and a > 0 for row in images for a in row for b in row)
    assert work.window_pairs == sum((a == b) and a > 0 for row in windows for a in row for b in row)


def test_an_empty_batch_is_no_work():
    work = flops.count(batch(np.zeros((1, 8)), np.zeros((1, 8)), np.zeros((1, 4)), np.zeros((1, 4)), np.zeros((1, 8))))
    assert (flops.text_forward(TINY.text, work), flops.vision_forward(TINY.vision, work)) == (0, 0)


def test_text_against_xla_on_the_same_matrices():
    """One layer's products in full, as XLA counts them; ours halves attention, so its share is taken twice."""
    text, t = TINY.text, 32
    d, f, n, k, h = 128, 384, 4, 2, 32

    def layer(x, q, kv, o, gate, up, down):
        heads = jnp.einsum("TD,DNH->TNH", x, q)
        keys = jnp.einsum("TD,DKH->TKH", x, kv[0]).repeat(n // k, 1)
        values = jnp.einsum("TD,DKH->TKH", x, kv[1]).repeat(n // k, 1)
        mixed = jnp.einsum("NTS,SNH->TNH", jnp.einsum("TNH,SNH->NTS", heads, keys), values)
        hidden = jnp.einsum("TNH,NHD->TD", mixed, o)
        return ((hidden @ gate) + (hidden @ up)) @ down

    shapes = [(t, d), (d, n, h), (2, d, k, h), (n, h, d), (d, f), (d, f), (f, d)]
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    analysis = jax.jit(layer).lower(*args).compile().cost_analysis()
    work = dataclasses.replace(NOTHING, tokens=t, pairs=t * t)
    ours = flops.text_forward(text, work) / text.num_hidden_layers
    assert analysis["flops"] == pytest.approx(ours, rel=0.01)


@pytest.mark.parametrize("trained", [False, True])
def test_a_whole_model_against_the_compiler(trained):
    """The tiny model's loss, and its loss with all gradients, layers unrolled so that nothing hides in a loop.

    The compiled program computes on padding too, every pair of a row, the three blocks that a window may touch, and
    logits everywhere; told so, the ledger must find what the compiler counts but for what it leaves out: norms, rotary
    angles, softmax, activations and the loss itself, about 3 % at this width (and less, the wider the model).
    """
    B, T, P, shape = 2, 256, 256, jax.ShapeDtypeStruct
    structure = Structure.of(nnx.eval_shape(lambda: Qwen2_5_VL(TINY, rngs=nnx.Rngs(0))))
    arrays = {path: shape(variable.shape, jnp.float32) for path, variable in structure.variables.items()}
    ids = dict.fromkeys(("tokens", "segment_ids", "view_ids", "targets", "feature_index"), shape((1, B, T), jnp.int32))
    ids |= dict.fromkeys(("patch_window", "patch_image"), shape((1, P), jnp.int32))
    ids |= {"positions": shape((1, B, 3, T), jnp.int32), "patch_positions": shape((1, P, 2), jnp.int32)}
    ids |= {"loss_weights": shape((1, B, T), jnp.float32), "patches": shape((1, P, 588), jnp.uint8)}
    config = schema.default("sft")
    config.model.update(unroll=TINY.text.num_hidden_layers, remat="none")
    config.data.image_patches = P
    config = schema.resolve(config)

    def loss(arrays, batch):
        return sft.loss(LatentVLM(structure.build(arrays), None), batch, config)[0]["next_token"][0]

    program = jax.jit(jax.value_and_grad(loss) if trained else loss, compiler_options=QUICK)
    counted = program.lower(arrays, ids).compile().cost_analysis()["flops"]
    seen = P * min(P, 3 * TINY.vision.window_patches)
    work = dataclasses.replace(
        NOTHING, tokens=B * T, supervised=B * T, pairs=B * T * T, patches=P, window_pairs=seen, image_pairs=P * P
    )
    text, vision = flops.Ledger(TINY, "cpu", 1, vision="weights").flops(work)
    ours = (text + vision) / (1 if trained else 3)
    assert 1.0 < counted / ours < 1.05


def test_published_7b_by_the_rule_of_thumb():
    """6 FLOPs a parameter and token for training: 7.07e9 matrix parameters without embeddings, with lm_head .545e9."""
    config = from_json(PRESETS / "qwen2_5_vl_7b.json")
    work = dataclasses.replace(NOTHING, tokens=8192, supervised=8192, pairs=8192**2 / 2)
    matrices = 28 * (2 * 3584**2 + 2 * 3584 * 512 + 3 * 3584 * 18944) + 3584 * 152064
    attention = 28 * 6 * 8192**2 * 3584
    text, vision = flops.Ledger(config, "NVIDIA H200", 1).flops(work)
    assert text == pytest.approx(6 * matrices * 8192 + attention)
    assert matrices == pytest.approx(7.07e9, rel=0.01) and vision == 0


def test_vision_by_hand():
    work = dataclasses.replace(NOTHING, patches=32, window_pairs=512, image_pairs=1024)
    d, f, depth, full = 64, 192, 2, 1
    embed = 32 * 2 * 588 * d
    blocks = depth * 32 * (2 * d * 3 * d + 2 * d * d + 3 * 2 * d * f)
    attention = full * 1024 * 4 * d + (depth - full) * 512 * 4 * d
    merger = 8 * (2 * 256 * 256 + 2 * 256 * 128)
    assert flops.vision_forward(TINY.vision, work) == embed + blocks + attention + merger


def test_a_trained_vision_tower_costs_three_forwards():
    frozen, trained = (flops.Ledger(TINY, "cpu", 1, vision=kind).flops(SOME) for kind in ("nothing", "weights"))
    assert trained == (frozen[0], 3 * frozen[1])


def test_adapters_spare_the_weights_gradient_matmuls():
    """Two passes of the matmuls, three of the attention; the vision tower as ever."""
    text = TINY.text
    t, d, f, h = SOME.tokens, text.hidden_size, text.intermediate_size, text.head_size
    n, k = text.num_attention_heads, text.num_key_value_heads
    layer = t * (2 * d * n * h * 2 + 2 * 2 * d * k * h + 3 * 2 * d * f)
    matmuls = text.num_hidden_layers * layer + 2 * d * text.vocab_size * SOME.supervised
    attention = text.num_hidden_layers * 4 * n * h * SOME.pairs
    found, vision = flops.Ledger(TINY, "cpu", 1, text="adapters").flops(SOME)
    assert found == pytest.approx(2 * matmuls + 3 * attention)
    assert vision == flops.Ledger(TINY, "cpu", 1).flops(SOME)[1]


def test_utilisation_is_against_all_devices():
    ledger = flops.Ledger(TINY, "NVIDIA A100-SXM4-80GB", 8)
    text, vision = ledger.flops(SOME)
    assert ledger.utilisation(SOME, 2.0) == {"mfu": text / (16 * 312e12), "mfu_vision": vision / (16 * 312e12)}
    assert flops.Ledger(TINY, "cpu", 1).utilisation(SOME, 2.0) == {}


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5p", 459),
        ("TPU v5", 459),
        ("TPU v6 lite", 918),
    ],
)
def test_peaks_by_the_names_that_jax_gives(kind, teraflops):
    assert flops.peak(kind) == teraflops * 1e12


def test_work_adds_up():
    one = flops.Work(tokens=1, supervised=2, pairs=3.0, patches=4, window_pairs=5, image_pairs=6, channels=588)
    two = flops.Work(tokens=2, supervised=4, pairs=6.0, patches=8, window_pairs=10, image_pairs=12, channels=588)
    assert one + one == two


def test_a_merger_that_is_trained_alone_costs_two_more_passes_of_itself():
    frozen, merger, trained = (
        flops.Ledger(TINY, "cpu", 1, vision=kind).flops(SOME)[1] for kind in ("nothing", "merger", "weights")
    )
    c, out = 4 * TINY.vision.hidden_size, TINY.vision.out_hidden_size
    assert merger - frozen == pytest.approx(2 * 2 * (c * c + c * out) * SOME.patches / 4)
    assert frozen < merger < trained == 3 * frozen
