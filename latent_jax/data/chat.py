"""Chat messages to layouts, and layouts to arrays: the host side's one place that knows a tokenizer.

Token ids equal those of HF's Qwen2_5_VLProcessor (chat template, then `<|image_pad|>` repeated per merged token).
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from latent_jax.config import fields
from latent_jax.data import images as pixels
from latent_jax.data import stretches
from latent_jax.data import tokenizer as tokenizers
from latent_jax.data.image_readers import ImageDecoder, SizeReader
from latent_jax.data.image_spec import ImageSpec, read_json
from latent_jax.data.layout import BOUNDARIES, Example, Image, Layout, Part, Text, Video, share_trunk
from latent_jax.data.messages import normalised, record
from latent_jax.data.positions import mrope
from latent_jax.data.stretches import IMAGE_PAD, VIDEO_PAD, Visual
from latent_jax.errors import UserError, one_line

_PLACEHOLDER = re.compile(r"<\|vision_start\|>(<\|(?:image|video)_pad\|>)<\|vision_end\|>")


@dataclasses.dataclass(frozen=True, eq=False)
class Processor:
    """A checkpoint's tokenizer and image preprocessing, with the ids that tie them together. Safe to share by threads.

    `tokenizer` is a fast HF tokenizer with Qwen's special tokens and a chat template; `tokens_per_second` is
    vision_config's (temporal positions per second of video). Raises UserError naming a missing special token.
    """

    tokenizer: Any
    image: ImageSpec
    tokens_per_second: float = 4.0

    def __post_init__(self) -> None:
        for token in (*BOUNDARIES, IMAGE_PAD, VIDEO_PAD):
            if len(self.encode(token).ids) != 1:
                raise UserError(f"tokenizer: special token {token} is missing; expected a Qwen2.5-VL tokenizer")

    @classmethod
    def from_directory(
        cls, directory: str | Path, min_pixels: int | None = None, max_pixels: int | None = None
    ) -> "Processor":
        """Reads tokenizer, preprocessor_config.json and config.json of an HF checkpoint directory."""
        directory = Path(directory)
        image = ImageSpec.from_directory(directory, min_pixels, max_pixels)
        config, where = read_json(directory / "config.json"), directory / "config.json"
        seconds = config["vision_config"].get("tokens_per_second", 4)
        seconds = fields.check(f"{where}: vision_config.tokens_per_second", seconds, float, dict(above=0, high=10**6))
        processor = cls(tokenizers.read(directory), image, seconds)
        for key, ours in (("image_token_id", processor.image_token_id), ("video_token_id", processor.video_token_id)):
            if config.get(key, ours) != ours:
                raise UserError(f"{where}: {key} is {fields.shown(config[key])}, the tokenizer's is {ours}")
        text = config.get("text_config")
        rows = {**config, **(text if isinstance(text, dict) else {})}.get("vocab_size")
        if rows is not None:
            processor.check_rows(fields.check(f"{where}: vocab_size", rows, int, dict(low=1)), str(directory))
        return processor

    def check_rows(self, rows: int, where: str) -> None:
        """Raises UserError where the tokenizer has a token that an embedding of so many rows has no row for.

        A gather clamps such an id to the last row: the model would read another token without a word.
        """
        vocabulary = self.tokenizer.backend_tokenizer.get_vocab(with_added_tokens=True)
        token = max(vocabulary, key=vocabulary.get)
        if vocabulary[token] >= rows:
            raise UserError(
                f"{where}: the tokenizer's {fields.shown(token)} has the id {vocabulary[token]}, but the embedding has "
                f"{rows} rows (vocab_size); expected ids below it"
            )

    def encode(self, text: str) -> Any:
        """The backend tokenizer's Encoding (ids, offsets). Raises UserError for text that is not Unicode."""
        # The backend itself: the wrapper sets truncation and padding on shared state at every call.
        try:
            return self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        except (TypeError, UnicodeError):  # TypeError: how the backend answers text that is not UTF-8
            raise UserError(f"text that is not Unicode (a lone surrogate): {text[:80]!r}") from None

    @functools.cached_property
    def image_token_id(self) -> int:
        return self.encode(IMAGE_PAD).ids[0]

    @functools.cached_property
    def video_token_id(self) -> int:
        return self.encode(VIDEO_PAD).ids[0]

    @functools.cached_property
    def vision_marks(self) -> tuple[int, int]:
        return self.encode("<|vision_start|>").ids[0], self.encode("<|vision_end|>").ids[0]

    # ------------------------------------------------------------ messages -> Layout

    def render(
        self,
        messages: object,  # checked by data/messages.py: bad ones are a UserError
        add_generation_prompt: bool = False,
        *,
        imagined_grid: int | tuple[int, int] | None = None,
        image_loss: bool = False,
        key: str = "",
    ) -> Layout:
        """HF chat messages through the tokenizer's chat template, as one trunk.

        Assistant turns carry loss: their text and the `<|im_end|>` that closes them, not the header before and not the
        newline after; with `image_loss` their images too (Image.loss). A part {"type": "imagine"} becomes given Slots
        with its own "grid" or `imagined_grid`.
        """
        parts, sources = self._parts(messages, add_generation_prompt, imagined_grid, image_loss, key, {})
        return Layout(images=tuple(sources), trunk=parts, key=key)

    def render_views(self, content: Sequence[Mapping], pairs: Sequence[tuple[str, str]], *, key: str = "") -> Layout:
        """Several (question, answer) pairs about the same content parts (such as an image), as views that share it.

        Trunk and view i together have the tokens of `render` on the i-th conversation alone.
        """
        return self.render_conversations(
            [
                [
                    {"role": "user", "content": [*content, {"type": "text", "text": question}]},
                    {"role": "assistant", "content": answer},
                ]
                for question, answer in pairs
            ],
            key=key,
        )

    def render_conversations(
        self,
        conversations: Sequence[Sequence[Mapping]],
        *,
        imagined_grid: int | tuple[int, int] | None = None,
        image_loss: bool = False,
        key: str = "",
    ) -> Layout:
        """Conversations with a common beginning, as views of one trunk; a shared image is encoded once."""
        if not conversations:
            raise UserError(f"{record(key)}no conversation to show")
        sources: dict[Any, Any] = {}
        rendered = [
            self._parts(messages, False, imagined_grid, image_loss, key, sources)[0] for messages in conversations
        ]
        trunk, views = share_trunk(rendered)
        return Layout(images=tuple(sources.values()), trunk=trunk, views=views, key=key)

    def _parts(
        self,
        messages: object,
        add_generation_prompt: bool,
        imagined_grid: int | tuple[int, int] | None,
        image_loss: bool,
        key: str,
        sources: dict[Any, Any],
    ) -> tuple[tuple[Part, ...], tuple[Any, ...]]:
        """(parts, image sources). `sources` maps the identity of a source to it, in the order of Layout.images."""
        plain, visuals = normalised(messages, imagined_grid, self.image.temporal_patch_size, key, sources)
        text = self._template(plain, add_generation_prompt, key)
        parts: list[Part] = []
        for piece, loss in self._marked_turns(plain, text, add_generation_prompt, key):
            literal = _PLACEHOLDER.split(piece)
            for i, segment in enumerate(literal):
                if i % 2 == 0:
                    parts += [Text(segment, loss)] if segment else []
                elif not visuals or isinstance(visuals[0], Video) != (segment == VIDEO_PAD):
                    raise UserError(f"{record(key)}{segment} stands in a message's text; images go in image parts")
                else:
                    part = visuals.pop(0)
                    if image_loss and loss and isinstance(part, Image):
                        part = dataclasses.replace(part, loss=True)
                    parts.append(part)
        if visuals:
            raise UserError(f"{record(key)}the chat template shows {len(visuals)} image(s) fewer than the messages")
        return tuple(parts), tuple(sources.values())

    def _template(self, messages: list[dict], add_generation_prompt: bool, key: str) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as problem:  # whatever the template's code does with these messages
            raise UserError(f"{record(key)}the chat template refuses these messages ({one_line(problem)})") from None

    def _marked_turns(
        self, messages: list[dict], text: str, add_generation_prompt: bool, key: str
    ) -> list[tuple[str, bool]]:
        """The rendered text cut into (piece, loss). Turns are found by rendering them again between marks."""
        spoken = [message["role"] == "assistant" for message in messages]
        if not any(spoken):
            return [(text, False)]
        # The mark does not occur in the text, and its first character occurs once in it. So it is found only where it
        # was put, whatever its neighbours are.
        mark = next(mark for number in itertools.count() if (mark := f"\ue000{number}\ue001") not in text)
        marked = [_between(message, mark) if turn else message for message, turn in zip(messages, spoken, strict=True)]
        pieces = self._template(marked, add_generation_prompt, key).split(mark)
        if "".join(pieces) != text or len(pieces) != 2 * sum(spoken) + 1:
            raise UserError(
                f"{record(key)}the chat template rewrites what the assistant says; its loss cannot be marked"
            )
        cut: list[tuple[str, bool]] = []
        for i, piece in enumerate(pieces):
            # Odd pieces are between marks; the end of turn after each belongs to it.
            closes = i and i % 2 == 0 and piece.startswith("<|im_end|>")
            cut += [("<|im_end|>", True), (piece[len("<|im_end|>") :], False)] if closes else [(piece, i % 2 == 1)]
        return cut

    # ------------------------------------------------------------ Layout -> Example

    def lay_out(self, layout: Layout, decode: bool = True) -> Example:
        """Tokens, positions, targets and patches of one layout (see Example for every field).

        Without `decode` images are not decoded and their patches are zeros; everything else is the same.
        Raises UserError naming the record where an image cannot be read.
        """
        visuals = self._visuals(layout, ImageDecoder(self.image) if decode else SizeReader(self.image))
        stretched = [stretches.stretch(self, parts, visuals, layout.key) for parts in (layout.trunk, *layout.views)]
        trunk, end = mrope(stretched[0].spans)
        positions = [trunk, *(mrope(each.spans, end)[0] for each in stretched[1:])]
        if any((each.flags[:1] & stretches.LOSS).any() for each in stretched[1:]):
            raise ValueError(f"record {layout.key!r}: a view starts with loss-carrying text; its predictor is missing")
        tokens, flags, features = (
            np.concatenate([getattr(each, name) for each in stretched]) for name in ("tokens", "flags", "features")
        )
        merged = sum(len(visual.patches.patches) for visual in visuals.values()) // self.image.merge_unit
        slots = stretches.number_slots(features, merged)
        lengths = [len(each.tokens) for each in stretched]
        ends = np.cumsum(lengths) - 1
        targets = [visuals[index] for index in layout.targets]
        return Example(
            tokens=tokens,
            view_ids=np.repeat(np.arange(len(stretched), dtype=np.int32), lengths),
            positions=np.concatenate(positions, axis=1),
            targets=stretches.successors(tokens, ends),
            loss_weights=stretches.successors(flags & stretches.LOSS, ends).astype(np.float32),
            feature_index=features,
            **self._patch_fields(visuals),
            slots=slots,
            reads=stretches.reads(stretched, layout.key),
            target_image=np.array([target.first_image for target in targets], np.int32),
            target_grid=np.array([target.merged_grid[1:] for target in targets], np.int32).reshape(-1, 2),
            key=layout.key,
            **stretches.asked(flags),
            target_latents=layout.latents,
        )

    def _visuals(self, layout: Layout, read: ImageDecoder | SizeReader) -> dict[int, Visual]:
        """The images that are shown or predicted, read and patchified once each, in the order of Layout.images."""
        shown = [part for parts in (layout.trunk, *layout.views) for part in parts if isinstance(part, Image | Video)]
        used = {part.index: isinstance(part, Video) for part in shown}
        for target in layout.targets:
            used.setdefault(target, isinstance(layout.images[target], list | tuple))
        visuals: dict[int, Visual] = {}
        merged = slices = 0
        for index in sorted(used):
            name = f"record {layout.key!r}: image {index}" if layout.key else ""
            source = layout.images[index]
            patches = read.video(source, name) if used[index] else read.still(source, name)
            visuals[index] = Visual(patches, merged, slices + 1, self.image)
            merged += len(patches.patches) // self.image.merge_unit
            slices += patches.grid[0]
        return visuals

    def _patch_fields(self, visuals: Mapping[int, Visual]) -> dict[str, np.ndarray]:
        """The patch arrays of all visuals, one after the other, window and image ids counted on."""
        all_patches = [visual.patches for visual in visuals.values()]
        if not all_patches:
            channels = 3 * self.image.patch_size**2
            return {
                "patches": np.zeros((0, channels), np.uint8),
                "patch_positions": np.zeros((0, 2), np.int32),
                "patch_window": np.zeros(0, np.int32),
                "patch_image": np.zeros(0, np.int32),
            }
        if len(all_patches) == 1:  # as they are: a copy of a large image's patches costs as much as cutting them
            only = all_patches[0]
            return {
                "patches": only.patches,
                "patch_positions": only.positions,
                "patch_window": only.window,
                "patch_image": only.image,
            }
        channels = max(each.patches.shape[1] for each in all_patches)
        windows = np.cumsum([0] + [each.window[-1] for each in all_patches[:-1]], dtype=np.int32)
        slices = np.cumsum([0] + [each.grid[0] for each in all_patches[:-1]], dtype=np.int32)
        return {
            "patches": np.concatenate([pixels.widen(each.patches, channels) for each in all_patches]),
            "patch_positions": np.concatenate([each.positions for each in all_patches]),
            "patch_window": np.concatenate([e.window + start for e, start in zip(all_patches, windows, strict=True)]),
            "patch_image": np.concatenate([e.image + start for e, start in zip(all_patches, slices, strict=True)]),
        }


def _between(message: Mapping, mark: str) -> dict:
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": mark + content + mark}
    edge = {"type": "text", "text": mark}
    return {**message, "content": [edge, *content, edge]}
