"""Conversations that show the model everything it can be shown, with noise for pictures."""

import numpy as np
import PIL.Image


def picture(height: int, width: int, seed: int = 0) -> PIL.Image.Image:
    """Smooth shading with noise on it, so that neighbouring patches are alike and no two are equal."""
    rng = np.random.default_rng(seed)
    smooth = rng.uniform(0, 200, (3, 3, 3)).repeat(-(-height // 3), 0).repeat(-(-width // 3), 1)[:height, :width]
    return PIL.Image.fromarray(np.clip(smooth + rng.normal(0, 40, smooth.shape), 0, 255).astype(np.uint8))


def user(*parts) -> list[dict]:
    """One turn; strings are text, pictures are images, (frames, fps) is a video."""
    return [{"role": "user", "content": [_part(part) for part in parts]}]


def _part(part) -> dict:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if isinstance(part, tuple):
        return {"type": "video", "video": part[0], "fps": part[1]}
    return {"type": "image", "image": part}


# Sizes in pixels; as patches of 14 these are 4 x 10 and the like, so that no window size divides all of them.
STILLS = [
    user("What is left of the red ball?"),
    user(picture(60, 140), "Describe the image."),
    user("First", picture(112, 84, 1), "then", picture(60, 56, 2), "What changed?"),
    user(picture(84, 168, 3), picture(168, 84, 4), picture(56, 56, 5), "Which one has a cube? " * 3),
]
CLIPS = [
    user(([picture(84, 112, seed) for seed in range(6, 11)], 0.1), "What happens?"),
    user(picture(84, 56, 11), "and", ([picture(56, 112, seed) for seed in (12, 13)], 2.0), "or", picture(56, 84, 14)),
    user("No picture here, only words."),
]
