"""Conversations as what a stock model takes in: tokens, padding, pixels, and where the loss falls.

Put together from tokenizer and image processor, because AutoProcessor wants torchvision. What differs from family to
family stands in families/NAME.py.
"""

import abc
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import PIL.Image
import torch
from transformers import AutoImageProcessor, AutoTokenizer

from latent_jax.data.image_spec import read_json
from latent_jax.data.images import open_image
from latent_jax.errors import UserError

IGNORED = -100  # torch's word for a token without loss
Pixels = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """One conversation: t token ids, which of them carry loss, and the tensors of its images ({} without any)."""

    ids: list[int]
    loss: list[bool]
    pixels: Pixels


class Processor(abc.ABC):
    """Of one checkpoint. A family says how an image is written (`look`), how images of a batch are joined, and which
    token ends a turn; the rest is the same for all.

    Raises UserError where the tokenizer is not fast or has no chat template.
    """

    IMAGE: str  # what the chat template writes for an image, and the token that an image feature replaces
    END = "<|im_end|>"  # ends the assistant's turn

    def __init__(self, directory: Path, **image_options):
        self.config = read_json(directory / "config.json")
        self.tokenizer = opened(AutoTokenizer, directory)
        template = directory / "chat_template.json"
        if not self.tokenizer.chat_template and template.exists():
            self.tokenizer.chat_template = read_json(template)["chat_template"]
        if not self.tokenizer.is_fast or not self.tokenizer.chat_template:
            raise UserError(f"{directory}: expected a fast tokenizer (tokenizer.json) with a chat template")
        self.images = opened(AutoImageProcessor, directory, backend="pil", **image_options)
        self.directory = directory

    @abc.abstractmethod
    def look(self, pictures: Sequence[PIL.Image.Image]) -> tuple[list[str], Pixels]:
        """For each picture of one conversation the text that stands for it, and what the model is to be given."""

    @abc.abstractmethod
    def pixel_limits(self) -> tuple[int, int]:
        """Least and most pixels that an image is resized to."""

    def join(self, pixels: Sequence[Pixels]) -> Pixels:
        """The images of several conversations, in order."""
        return {key: torch.cat([each[key] for each in pixels]) for key in pixels[0]}

    def extra(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Inputs that are derived from the token ids (rows, t)."""
        return {}

    def one_size(self, **limits: int) -> None:
        """Raises UserError for pixel limits, in a family whose images have the sizes that it was trained with."""
        for name, value in limits.items():
            if value:
                raise UserError(
                    f"config.data.{name}: got {value}, expected 0: images of "
                    f"{self.config['model_type']} have the sizes of its own image processor"
                )

    # ------------------------------------------------------------ conversations -> rows

    def ask(self, conversations: Sequence[list[dict]]) -> list[Row]:
        """Conversations that end with a question, with the generation prompt behind it."""
        look = self._looker()
        return [self._row(self._template(each, True), "", *look(each)) for each in conversations]

    def teach(self, conversations: Sequence[list[dict]]) -> list[Row]:
        """Conversations that end with an answer: the loss is on it and on the token that ends it, and nothing follows.

        Conversations about the same images (the same objects) share their pixels.
        """
        look, rows = self._looker(), []
        for messages in conversations:
            prompt, whole = self._template(messages[:-1], True), self._template(messages, False)
            if messages[-1]["role"] != "assistant" or not whole.startswith(prompt):
                raise UserError(f"{self.directory}: its chat template does not put the answer behind the question")
            rows.append(self._row(prompt, self._ended(whole[len(prompt) :]), *look(messages)))
        return rows

    def _looker(self):
        """`look` on a conversation, once for the same images."""
        known = {}

        def look(messages):
            sources = image_sources(messages)
            key = tuple(map(id, sources))
            if key not in known:
                known[key] = self.look([open_image(source) for source in sources]) if sources else ([], {})
            return known[key]

        return look

    def _template(self, messages: Sequence[dict], add_generation_prompt: bool) -> str:
        plain = [{"role": message["role"], "content": _plain(message["content"])} for message in messages]
        return self.tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=add_generation_prompt)

    def _ended(self, answer: str) -> str:
        """Up to the end of the turn, which some templates (LLaVA-1.5's) leave out."""
        return answer[: answer.index(self.END)] + self.END if self.END in answer else answer.rstrip() + self.END

    def _row(self, prompt: str, answer: str, shown: Sequence[str], pixels: Pixels) -> Row:
        pieces = prompt.split(self.IMAGE)
        if len(pieces) != len(shown) + 1 or self.IMAGE in answer:
            raise UserError(
                f"{len(shown)} image(s) in a conversation with {len(pieces) - 1} times {self.IMAGE} in its text"
            )
        prompt = "".join(piece + place for piece, place in zip(pieces, [*shown, ""], strict=True))
        encoded = self.tokenizer(prompt + answer, return_offsets_mapping=True)
        # One string, so that merges are those of the whole; a token carries loss if any of its characters does.
        loss = [end > max(start, len(prompt)) for start, end in encoded["offset_mapping"]]
        return Row(encoded["input_ids"], loss, pixels)

    # ------------------------------------------------------------ rows -> model inputs

    @functools.cached_property
    def pad(self) -> int:
        pad = self.tokenizer.pad_token_id
        return self.end if pad is None else pad

    @functools.cached_property
    def end(self) -> int:
        return self.tokenizer.convert_tokens_to_ids(self.END)

    def batch(self, rows: Sequence[Row], side: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """(model inputs, labels): padded on that side ("left" to generate, "right" to train), IGNORED without loss."""
        length = max(len(row.ids) for row in rows)
        ids = torch.full((len(rows), length), self.pad)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
        for i, row in enumerate(rows):
            span = slice(length - len(row.ids), length) if side == "left" else slice(0, len(row.ids))
            ids[i, span], mask[i, span] = torch.tensor(row.ids), 1
            labels[i, span] = torch.where(torch.tensor(row.loss), ids[i, span], IGNORED)
        inputs = {"input_ids": ids, "attention_mask": mask, **self.extra(ids)}
        seen = [row.pixels for row in rows if row.pixels]
        return inputs | (self.join(seen) if seen else {}), labels


def opened(kind, directory: Path, **options):
    """`kind.from_pretrained` on a local checkpoint. Raises UserError for whatever transformers finds wrong with it."""
    try:
        return kind.from_pretrained(directory, local_files_only=True, **options)
    except Exception as problem:  # whatever its files make transformers raise
        reason = str(problem).strip().partition("\n")[0] or type(problem).__name__
        raise UserError(f"{directory}: {kind.__name__} cannot open it: {reason}") from None


def image_sources(messages: Sequence[dict]) -> list:
    """The images of a conversation, in order. Raises UserError for any part but images and text."""
    found = []
    for message in messages:
        for part in [] if isinstance(message["content"], str) else message["content"]:
            if part["type"] == "image":
                found.append(part["image"])
            elif part["type"] != "text":
                raise UserError(f"a {part['type']!r} part cannot be shown to a stock model; expected image or text")
    return found


def _plain(content) -> list[dict]:
    """As parts, which every template takes, and without the images themselves."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [part if part["type"] == "text" else {"type": "image"} for part in content]
