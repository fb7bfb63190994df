"""Conversations that more than one method shows the model."""

from typing import TYPE_CHECKING

from latent_jax.data.layout import Layout

if TYPE_CHECKING:  # a method imports this file, and needs no tokenizer for it
    from latent_jax.data.chat import Processor

DESCRIBE = "Describe the image."


def described(record: dict, caption: str) -> list[dict]:
    """The ordinary image -> caption conversation, in HF chat format."""
    content = [{"type": "image", "image": record["images"][0]}, {"type": "text", "text": DESCRIBE}]
    return [{"role": "user", "content": content}, {"role": "assistant", "content": caption}]


def describe(record: dict, caption: str, processor: "Processor") -> Layout:
    """Layout of an ordinary image -> caption example, through the tokenizer's chat template."""
    return processor.render(described(record, caption), key=record["key"])
