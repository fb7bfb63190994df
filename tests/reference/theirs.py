"""Stock transformers' whole path: messages -> processor-made inputs -> model, with nothing of ours in it.

AutoProcessor wants torchvision for its video half, so the processor's three steps (chat template, patches, repeated
placeholders) are taken one by one with transformers' own parts.
"""

import dataclasses
import functools
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, Qwen2VLImageProcessorPil

IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"


@dataclasses.dataclass(frozen=True)
class Processor:
    tokenizer: object
    images: Qwen2VLImageProcessorPil

    @classmethod
    @functools.cache
    def of(cls, directory: Path) -> "Processor":
        tokenizer = AutoTokenizer.from_pretrained(directory)
        return cls(tokenizer, Qwen2VLImageProcessorPil.from_pretrained(directory))

    def __call__(self, conversations, *, padding_side="right", add_generation_prompt=True) -> dict[str, torch.Tensor]:
        """Model inputs of a batch, padded to the longest."""
        texts, stills, clips, seconds = [], [], [], []
        for messages in conversations:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
            for part in content(messages):
                if part["type"] == "image":
                    stills.append(self.images(images=[part["image"]], return_tensors="pt"))
                    text = self._widened(text, IMAGE, stills[-1]["image_grid_thw"])
                elif part["type"] == "video":
                    clips.append(self._clip(part["video"]))
                    seconds.append(self.images.temporal_patch_size / part["fps"])
                    text = self._widened(text, VIDEO, clips[-1]["image_grid_thw"])
            texts.append(text.replace("<wide>", ""))
        inputs = dict(self.tokenizer(texts, padding=True, padding_side=padding_side, return_tensors="pt"))
        ids = inputs["input_ids"]
        image, video = (self.tokenizer.convert_tokens_to_ids(token) for token in (IMAGE, VIDEO))
        inputs["mm_token_type_ids"] = (ids == image).int() + 2 * (ids == video).int()
        if stills:
            inputs["pixel_values"] = torch.cat([each["pixel_values"] for each in stills])
            inputs["image_grid_thw"] = torch.cat([each["image_grid_thw"] for each in stills])
        if clips:
            inputs["pixel_values_videos"] = torch.cat([each["pixel_values"] for each in clips])
            inputs["video_grid_thw"] = torch.cat([each["image_grid_thw"] for each in clips])
            inputs["second_per_grid_ts"] = torch.tensor(seconds)
        return inputs

    def _widened(self, text: str, token: str, grid: torch.Tensor) -> str:
        """The first placeholder that is not yet widened, repeated for every merged token."""
        count = int(grid.prod()) // self.images.merge_size**2
        assert f"<|vision_start|>{token}<|vision_end|>" in text
        widened = f"<|vision_start|><wide>{token * count}<|vision_end|>"
        return text.replace(f"<|vision_start|>{token}<|vision_end|>", widened, 1)

    def _clip(self, frames) -> dict[str, torch.Tensor]:
        """The image processor's pixels of every frame, two by two as the video processor lays them out."""
        frames = [*frames, *frames[-1:] * (len(frames) % 2)]
        made = [self.images(images=[frame], return_tensors="np") for frame in frames]
        pixels = [each["pixel_values"].reshape(len(each["pixel_values"]), 3, 2, -1)[:, :, 0] for each in made]
        pairs = [
            np.stack(pair, axis=2).reshape(len(pair[0]), -1) for pair in zip(pixels[::2], pixels[1::2], strict=True)
        ]
        rows, columns = made[0]["image_grid_thw"][0, 1:]
        return {
            "pixel_values": torch.tensor(np.concatenate(pairs)),
            "image_grid_thw": torch.tensor([[len(pairs), rows, columns]]),
        }


def content(messages):
    """All parts of a conversation; a plain string has none that matter here."""
    return [part for message in messages if not isinstance(message["content"], str) for part in message["content"]]


def real(inputs: dict[str, torch.Tensor], values: torch.Tensor) -> list[np.ndarray]:
    """Rows of values without their padding."""
    mask = inputs["attention_mask"].bool()
    return [row[keep].numpy() for row, keep in zip(values, mask, strict=True)]


def generate(model, inputs: dict, max_new_tokens: int, eos: tuple[int, ...], pad: int) -> list[list[int]]:
    """New tokens of every row up to and with its end token; greedy."""
    with torch.no_grad():
        out = model.generate(
            **inputs,
            do_sample=False,
            repetition_penalty=1.0,
            max_new_tokens=max_new_tokens,
            eos_token_id=list(eos),
            pad_token_id=pad,
        )
    rows = out[:, inputs["input_ids"].shape[1] :].tolist()
    return [row[: next((i + 1 for i, token in enumerate(row) if token in eos), len(row))] for row in rows]
