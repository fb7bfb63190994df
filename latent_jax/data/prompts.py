"""Conversations that more than one method shows the model."""

from latent_jax.data.layout import Layout

DESCRIBE = "Describe the image."


def describe(record: dict, caption: str, codec) -> Layout:
    """Layout of an ordinary image -> caption example, through the tokenizer's chat template."""
    content = [{"type": "image", "image": record["images"][0]}, {"type": "text", "text": DESCRIBE}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": caption}]
    return codec.render(messages, key=record["key"])
