"""Where the images of a question stand in its conversation."""

import pytest

from latent_jax.benchmarks.items import conversation


@pytest.mark.parametrize(
    ("prompt", "images", "content"),
    [
        ("What?", [], ["What?"]),
        ("What?", [1, 2], [1, 2, "What?"]),
        ("<image>What?", [1], [1, "What?"]),
        ("First <image> then <image>", [1, 2], ["First ", 1, " then ", 2]),
        ("<image><image>", [1, 2], [1, 2]),
        ("What is an <image>?", [1, 2], [1, 2, "What is an <image>?"]),
        ("What is an <image>?", [], ["What is an <image>?"]),
    ],
)
def test_images_before_the_prompt_or_in_their_places(prompt, images, content):
    (turn,) = conversation(prompt, images)
    assert turn["role"] == "user"
    assert [part[part["type"]] for part in turn["content"]] == content
