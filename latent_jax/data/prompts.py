"""Conversations that more than one method shows the model."""

from latent_jax.data.layout import Layout

DESCRIBE = "Describe the image."


def described(record: dict, caption: str) -> list[dict]:
    """The ordinary image -> caption conversation, in HF chat format."""
    content = [{"type": "image", "image": record["images"][0]}, {"type": "text", "text": DESCRIBE}]
    return [{"role": "user", "content": content}, {"role": "assistant", "content": caption}]


def describe(record: dict, caption: str, processor) -> Layout:
    """Layout of an ordinary image -> caption example, through the tokenizer's chat template."""
    return processor.render(described(record, caption), key=record["key"])
