"""Stock transformers' side: model inputs as Qwen2_5_VLProcessor makes them, padded to the longest of a batch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latent_jax.data.chat import IMAGE_PAD


def quiet() -> None:
    """No progress bars and no advice between the numbers."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def load_model(directory: Path) -> Any:
    """The checkpoint in float32 on the CPU, with the attention that transformers chooses."""
    import torch
    import transformers

    quiet()
    return transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)


def image_processor(directory: Path | None = None) -> Any:
    """The PIL image processor of a checkpoint, or with its defaults, which are the published ones."""
    import transformers

    quiet()
    # It had the plain name before torchvision's took it.
    kind = getattr(transformers, "Qwen2VLImageProcessorPil", None) or transformers.Qwen2VLImageProcessor
    return kind.from_pretrained(directory) if directory else kind()


def inputs(
    directory: Path, chat_template: str, conversations: Sequence[Sequence[dict]], *, side: str, prompt: bool
) -> dict[str, Any]:
    """Inputs of a batch of conversations with images, padded on `side`; `prompt` asks for an answer at the end.

    (AutoProcessor wants torchvision, so its three steps are taken one by one: template, patches, placeholders.)
    """
    import torch
    import transformers

    tokenizer, processor = transformers.AutoTokenizer.from_pretrained(directory), image_processor(directory)
    images, texts = [], []
    for messages in conversations:
        text = tokenizer.apply_chat_template(
            messages, chat_template=chat_template, tokenize=False, add_generation_prompt=prompt
        )
        pieces = text.split(IMAGE_PAD)
        shown = [part["image"] for message in messages for part in _parts(message) if part["type"] == "image"]
        for place, image in enumerate(shown):
            images.append(processor(images=[image], return_tensors="pt"))
            count = int(images[-1]["image_grid_thw"].prod()) // processor.merge_size**2
            pieces[place] += IMAGE_PAD * count
        texts.append("".join(pieces))
    made = dict(tokenizer(texts, padding=True, padding_side=side, return_tensors="pt"))
    made["mm_token_type_ids"] = (made["input_ids"] == tokenizer.convert_tokens_to_ids(IMAGE_PAD)).to(torch.int32)
    for key in ("pixel_values", "image_grid_thw") if images else ():
        made[key] = torch.cat([each[key] for each in images])
    return made


def _parts(message: dict) -> list[dict]:
    return [] if isinstance(message["content"], str) else message["content"]
