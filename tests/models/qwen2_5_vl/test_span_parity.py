"""Answers with latents inside, token for token against a slow decoder around stock transformers.

The reference reads the whole sequence anew for every token and has no cache. It asks stock `get_rope_index` where each
of them stands, with latents on a grid given to it as an image of that grid.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import latent_jax
from latent_jax.config.training import Config
from latent_jax.inference import batches
from latent_jax.inference.spans import Writing
from latent_jax.methods.contract import Span
from tests.reference import theirs
from tests.reference.checkpoints import model as random_model
from tests.reference.checkpoints import token_ids, write
from tests.reference.conversations import CLIPS, STILLS

NEW = 18
SETTINGS = Config(method="sft")
# Words alone; images; and a clip whose time runs past the text's positions.
PROMPTS = [STILLS[0], STILLS[2], CLIPS[0]]

OPENS, CLOSES, PAD = (token_ids()[f"<|{name}|>"] for name in ("vision_start", "vision_end", "image_pad"))


@dataclasses.dataclass
class Expected:
    ids: list[int]
    latents: list[np.ndarray]  # (count, D) of each span that was closed


@torch.no_grad()
def expected(
    model, inputs: dict, shape: int | tuple[int, int], eos=(), rule: Callable[[list[int]], bool] | None = None
) -> Expected:
    """Greedy in words. Behind an opening mark come so many final hidden states, each the next input, and the closing
    mark. rule: tokens so far -> the next one is the opening mark."""
    core, text = model.model, model.model.language_model
    merge = model.config.vision_config.spatial_merge_size
    count = shape if isinstance(shape, int) else shape[0] * shape[1]
    ids, kinds = inputs["input_ids"][0].tolist(), inputs["mm_token_type_ids"][0].tolist()
    grids = [torch.as_tensor(grid) for grid in inputs.get("image_grid_thw", [])]
    prompt, embeds = len(ids), shown(model, inputs)
    latents, fed, forced = [], [], []
    while len(ids) - prompt < NEW:
        # The tokens that are known to come are laid out too: a grid is whole or it is none.
        positions, _ = core.get_rope_index(
            input_ids=torch.tensor([ids + forced]),
            mm_token_type_ids=torch.tensor([kinds + [on_grid(token, shape) for token in forced]], dtype=torch.int32),
            image_grid_thw=torch.stack(grids) if grids else None,
            video_grid_thw=inputs.get("video_grid_thw"),
            second_per_grid_ts=inputs.get("second_per_grid_ts"),
        )
        hidden = text(inputs_embeds=embeds, position_ids=positions[:, :, : len(ids)], use_cache=False)[0][0, -1]
        if forced:
            token = forced.pop(0)
        elif rule and rule(ids[prompt:]):
            token = OPENS
        else:
            token = int(model.lm_head(hidden).argmax())
        if token == OPENS and not forced and (len(ids) == prompt or ids[-1] != PAD):
            forced, fed = [PAD] * count + [CLOSES], []
            if not isinstance(shape, int):
                grids.append(torch.tensor([1, shape[0] * merge, shape[1] * merge]))
            x, kind = text.embed_tokens.weight[OPENS], 0
        elif forced:  # a latent: its token was taken from the front, the closing mark is behind it
            fed.append(hidden.numpy())
            x, kind = hidden, on_grid(token, shape)
        else:
            if ids[-1] == PAD:
                latents.append(np.stack(fed))
            x, kind = text.embed_tokens.weight[token], 0
        ids.append(token)
        kinds.append(kind)
        embeds = torch.cat([embeds, x[None, None]], dim=1)
        if token in eos:
            break
    return Expected(ids[prompt:], latents)


def on_grid(token: int, shape: int | tuple[int, int]) -> int:
    """What `get_rope_index` calls an image's token: 1."""
    return int(token == PAD and not isinstance(shape, int))


def shown(model, inputs: dict) -> torch.Tensor:
    """(1, T, D): embeddings of a prompt, its images and clips in their places."""
    ids = inputs["input_ids"][0]
    embeds = model.model.language_model.embed_tokens(ids).clone()
    if "pixel_values" in inputs:
        seen = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
        embeds[ids == model.config.image_token_id] = torch.cat(list(seen))
    if "pixel_values_videos" in inputs:
        seen = model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"]).pooler_output
        embeds[ids == model.config.video_token_id] = torch.cat(list(seen))
    return embeds[None]


def opening(name: str):
    """A random model that opens spans of its own accord: the logits of its opening mark are larger than others."""
    model = random_model(name)
    with torch.no_grad():
        model.lm_head.weight[OPENS] *= 4
    return model


def ours(directory, prompts, span: Span):
    vlm = latent_jax.load(directory)
    examples, given = vlm.prompts(prompts)
    return batches.answers(
        (vlm.model,), examples, given, vlm.eos, max_new_tokens=NEW, writing=Writing(span, SETTINGS, True)
    ), vlm.eos


def identity(model, hidden, carry, i, config):
    return hidden, hidden, carry


def by_rule(tokens, written, config):
    """The third token, and the one behind each tenth."""
    return jnp.full((len(tokens),), (written == 2) | ((written > 0) & (written % 10 == 0)))


@pytest.mark.parametrize(
    "name, shape",
    [
        ("as_published", (2, 3)),
        ("first_full_tied", 1),
    ],
)
def test_spans_that_the_model_opens_equal_a_slow_decoder(tmp_path, name, shape):
    model = opening(name)
    span = Span(most=lambda config: 7, shape=lambda example, config: shape, feed=identity)
    found, eos = ours(write(model, tmp_path), PROMPTS, span)
    wanted = [expected(model, theirs.Processor.of(tmp_path)([each]), shape, eos) for each in PROMPTS]
    compare(found, wanted)
    assert sum(OPENS in each.ids for each in found) > 1, "the answers open no span"
    assert any(len(each.latents) for each in wanted), "the answers close no span"


def test_spans_that_are_opened_by_rule_equal_a_slow_decoder(tmp_path):
    model, shape = random_model("deep"), (1, 4)
    span = Span(most=lambda config: 4, shape=lambda example, config: shape, feed=identity, rule=by_rule)
    found, eos = ours(write(model, tmp_path), PROMPTS, span)
    process = theirs.Processor.of(tmp_path)
    wanted = [expected(model, process([each]), shape, eos, lambda said: len(said) in (2, 10)) for each in PROMPTS]
    compare(found, wanted)
    assert all(each.ids[2] == OPENS for each in found)


def compare(found, wanted):
    assert [each.ids for each in found] == [each.ids for each in wanted]
    for mine, theirs_ in zip(found, wanted, strict=True):
        for (latents, inputs), want in zip(mine.spans, theirs_.latents, strict=False):  # kept ones; closed ones
            np.testing.assert_allclose(inputs, want, rtol=0, atol=2e-4 * max(1, np.abs(want).max()))
            np.testing.assert_allclose(latents, want, rtol=0, atol=2e-4 * max(1, np.abs(want).max()))
