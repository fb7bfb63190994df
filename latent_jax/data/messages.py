"""Chat messages in HF format, checked: a conversation is a list of {"role": str, "content": str or list of parts}."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from latent_jax.config import fields
from latent_jax.data.layout import Image, Part, Slots, Video
from latent_jax.errors import UserError

Messages = Sequence[Mapping[str, Any]]  # a conversation in chat format


def record(key: str) -> str:
    """How a message begins: with the record's name, where there is one."""
    return f"record {key!r}: " if key else ""


def check(messages: Any, key: str = "") -> None:
    """Raises UserError where `messages` is no list of {"role": str, "content": str or list of parts}."""
    if not isinstance(messages, list | tuple):
        raise UserError(
            f"{record(key)}conversation {fields.shown(messages)}; expected a list of messages, each a dict of role "
            "and content"
        )
    if not messages:
        raise UserError(f"{record(key)}a conversation without a message; expected at least one")
    for message in messages:
        content = message.get("content") if isinstance(message, Mapping) else None
        if not isinstance(content, str | list | tuple) or not isinstance(message.get("role"), str):
            raise UserError(f"{record(key)}message {_brief(message)}; expected a dict of role and content")
        for part in () if isinstance(content, str) else content:
            if not isinstance(part, Mapping):
                raise UserError(f"{record(key)}message part {_brief(part)}; expected a dict with a 'type'")


def _brief(value: object) -> str:
    """Cut short, and safe to print whatever text it holds."""
    return ascii(value)[:80] if isinstance(value, str) else str(value)[:80].encode(errors="replace").decode()


def normalised(
    messages: Any,
    imagined_grid: int | tuple[int, int] | None,
    temporal_patch_size: int,
    key: str,
    sources: dict[Any, Any],
) -> tuple[list[dict], list[Part]]:
    """Messages as the template takes them (an imagined image is an image to it), and the visual parts in order."""
    check(messages, key)
    places = {identity: index for index, identity in enumerate(sources)}
    visuals: list[Part] = []

    def index_of(source: Any) -> int:
        identity = str(source) if isinstance(source, str | Path) else id(source)
        sources[identity] = source
        return places.setdefault(identity, len(places))

    def plain(part: Mapping) -> dict[str, str]:
        kind = part.get("type")
        if kind == "text" and isinstance(part.get("text"), str):
            return {"type": "text", "text": part["text"]}
        if kind == "image" and (source := _first(part, "image", "path", "url")) is not None:
            visuals.append(Image(index_of(_local(source, key))))
        elif kind == "video" and part.get("video") is not None:
            visuals.append(Video(index_of(_frames(part["video"], key)), _seconds(part, temporal_patch_size, key)))
        elif kind == "imagine" and (grid := part.get("grid") or imagined_grid) is not None:
            shape = fields.check(f"{record(key)}grid", grid, int | tuple[int, int], dict(low=1, high=256))
            visuals.append(Slots(shape, source="given"))
        else:
            raise UserError(
                f"{record(key)}message part {_brief(part)}; expected text, image, video (a list of "
                "frames) or, where the model has a latent head, imagine"
            )
        return {"type": "video" if kind == "video" else "image"}

    result = []
    for message in messages:
        content = message["content"]
        shown = content if isinstance(content, str) else [plain(part) for part in content]
        result.append({**message, "content": shown})
    return result, visuals


def imagine_parts(messages: Messages) -> list[dict]:
    """The imagine parts of a conversation: any number with text, or one without. Raises UserError for anything else."""
    content = (message["content"] for message in messages if not isinstance(message["content"], str))
    found = [part for parts in content for part in parts if part.get("type") == "imagine"]
    texts = [part["text"] for part in found if "text" in part]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise UserError("an 'imagine' part holds no text; expected a description, or no 'text' at all")
    if len(found) > 1 and any("text" not in part for part in found):
        raise UserError(
            "an 'imagine' part without 'text' beside another; expected it to be its conversation's only one"
        )
    return found


def without_imagined(messages: Messages) -> list[Mapping[str, Any]]:
    """The conversation with its imagine parts taken out."""
    return [
        message
        if isinstance(message["content"], str)
        else {**message, "content": [part for part in message["content"] if part.get("type") != "imagine"]}
        for message in messages
    ]


def _local(source: Any, key: str) -> Any:
    if isinstance(source, str) and re.match(r"(?:https?|ftp|file|data):", source):
        raise UserError(f"{record(key)}image {_brief(source)} is a URL; expected a path, bytes, an image or an array")
    return source


def _frames(video: Any, key: str) -> Sequence[Any]:
    """The frames of a video part. An array's are kept as they are found again: by the array that they are part of."""
    if isinstance(video, np.ndarray) and video.ndim == 4:
        video = list(video)
    if not isinstance(video, list | tuple) or not len(video):
        what = f"of shape {video.shape}" if isinstance(video, np.ndarray) else _brief(video)
        raise UserError(f"{record(key)}video {what}; expected a list of frames, or an array (frames, rows, columns, 3)")
    return video


def _seconds(part: Mapping, temporal_patch_size: int, key: str) -> float:
    """The time between two temporal slices."""
    if part.get("fps") is None:
        return 1.0
    limits = dict(low=0.001, high=1000)
    return temporal_patch_size / fields.check(f"{record(key)}fps of a video", part["fps"], float, limits)


def _first(part: Mapping, *keys: str) -> Any:
    return next((part[key] for key in keys if part.get(key) is not None), None)
