"""Messages that mean nothing are named; what stands in a text never moves the loss."""

import numpy as np
import pytest
from PIL import Image

from latent_jax.data import messages
from latent_jax.errors import UserError
from tests.reference import small

FRAME = Image.new("RGB", (56, 56))
BAD = {
    "a string": ("hello", "expected a list of messages"),
    "a message": ({"role": "user", "content": "x"}, "expected a list of messages"),
    "none": (None, "expected a list of messages"),
    "empty": ([], "without a message"),
    "no dict": (["hello"], "a dict of role and content"),
    "a list in a list": ([[{"role": "user", "content": "x"}]], "a dict of role and content"),
    "content none": ([{"role": "assistant", "content": None, "tool_calls": []}], "a dict of role and content"),
    "content a number": ([{"role": "user", "content": 7}], "a dict of role and content"),
    "role none": ([{"role": None, "content": "x"}], "a dict of role and content"),
    "no content": ([{"role": "user"}], "a dict of role and content"),
}
PARTS = {
    "bare": ("x", "expected a dict with a 'type'"),
    "audio": ({"type": "audio", "audio": "x.wav"}, "audio.*expected text, image, video"),
    "type a list": ({"type": ["text"], "text": "x"}, "expected text, image, video"),
    "text none": ({"type": "text", "text": None}, "expected text, image, video"),
    "image none": ({"type": "image", "image": None}, "expected text, image, video"),
    "url": ({"type": "image", "image": "https://example.org/a.png"}, "is a URL; expected a path"),
    "data url": ({"type": "image", "url": "data:image/png;base64,AAAA"}, "is a URL; expected a path"),
    "clip": ({"type": "video", "video": "/tmp/clip.mp4"}, r"clip\.mp4.*a list of frames"),
    "no frames": ({"type": "video", "video": []}, "a list of frames"),
    "one picture": ({"type": "video", "video": np.zeros((56, 56, 3), np.uint8)}, r"\(56, 56, 3\).*a list of frames"),
    "fps text": ({"type": "video", "video": [FRAME], "fps": "2"}, "fps of a video: got '2'"),
    "fps nan": ({"type": "video", "video": [FRAME], "fps": float("nan")}, "fps of a video"),
    "fps zero": ({"type": "video", "video": [FRAME], "fps": 0}, "fps of a video"),
    "fps tiny": ({"type": "video", "video": [FRAME], "fps": 1e-300}, "fps of a video"),
    "grid": ({"type": "imagine", "grid": "4x4"}, "grid: got '4x4'"),
    "grid huge": ({"type": "imagine", "grid": [10**9, 1]}, "grid: got"),
}


def one_line(problem) -> bool:
    return "\n" not in str(problem.value) and str(problem.value).startswith("record 'r3': ")


@pytest.mark.parametrize("conversation, words", BAD.values(), ids=BAD)
def test_what_is_no_conversation_is_named(conversation, words):
    with pytest.raises(UserError, match=words) as problem:
        small.processor().render(conversation, key="r3")
    assert one_line(problem)


@pytest.mark.parametrize("part, words", PARTS.values(), ids=PARTS)
def test_a_part_that_means_nothing_is_named(part, words):
    with pytest.raises(UserError, match=words) as problem:
        small.processor().render([{"role": "user", "content": [part]}], key="r3")
    assert one_line(problem)


def test_a_video_may_be_an_array_of_frames():
    array = np.random.default_rng(0).integers(0, 255, (4, 56, 56, 3), np.uint8)
    shown = [
        small.processor().lay_out(
            small.processor().render([{"role": "user", "content": [{"type": "video", "video": video}]}])
        )
        for video in (array, list(array))
    ]
    np.testing.assert_array_equal(shown[0].patches, shown[1].patches)
    np.testing.assert_array_equal(shown[0].tokens, shown[1].tokens)


@pytest.mark.parametrize(
    "end", ["\ue000", "\ue000\ue000", "\ue0000\ue001", "\ue001", "\ue0001", "\ue000" * 9 + "\ue001"]
)
def test_the_loss_is_on_the_whole_answer_whatever_it_ends_in(end):
    processor = small.processor()
    for answer in ("red " + end, end + " red", end):
        example = processor.lay_out(
            processor.render([{"role": "user", "content": end + "?"}, {"role": "assistant", "content": answer}])
        )
        spoken = [int(token) for token, weight in zip(example.targets, example.loss_weights) if weight > 0]
        assert processor.tokenizer.backend_tokenizer.decode(spoken, skip_special_tokens=False) == answer + "<|im_end|>"


def test_text_that_is_not_unicode_is_named():
    with pytest.raises(UserError, match="'r3': text that is not Unicode") as problem:
        small.processor().lay_out(small.processor().render([{"role": "user", "content": "a\ud800b"}], key="r3"))
    str(problem.value).encode()


def test_a_key_is_not_needed():
    with pytest.raises(UserError, match="^a conversation without a message"):
        messages.check([])
