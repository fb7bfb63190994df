"""Layout values: bad indices, and the trunk that conversations share."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_jax.data.layout import Image, Layout, Slots, Text, Video, share_trunk, with_learned_slots
from latent_jax.errors import UserError


@pytest.mark.parametrize(
    "layout",
    [
        {"trunk": (Image(0),)},
        {"images": (b"x",), "views": ((Video(1),),)},
        {"images": (b"x",), "targets": (0, 1)},
    ],
)
def test_an_index_outside_the_images_names_the_record(layout):
    with pytest.raises(UserError, match="record 'r7'"):
        Layout(key="r7", **layout)


def turn(question, answer):
    return [
        Text("<|im_start|>user\n"),
        Image(0),
        Text(f"{question}<|im_end|>\n<|im_start|>assistant\n"),
        Text(answer, True),
        Text("<|im_end|>", True),
        Text("\n"),
    ]


def flat(parts):
    """Characters and blocks one by one, each with its loss: what a conversation is, however it is cut."""
    return [
        unit for part in parts for unit in ([(c, part.loss) for c in part.text] if isinstance(part, Text) else [part])
    ]


@given(
    st.lists(
        st.tuples(st.sampled_from(["", "a", "ab", "What?"]), st.sampled_from(["x", "xy", "<|im_end|>"])),
        min_size=1,
        max_size=4,
    ),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_trunk_and_view_are_the_conversation(pairs, slots):
    conversations = [turn(*pair) + ([Slots((1, 2))] if slots else []) for pair in pairs]
    trunk, views = share_trunk(conversations)
    if len(pairs) == 1:
        assert views == ()
    for conversation, view in zip(conversations, views or [()], strict=True):
        assert flat(trunk + view) == flat(conversation)
        if views:
            assert not any(isinstance(part, Text) and part.loss for part in view[:1])


def test_the_shared_image_is_in_the_trunk_and_no_word_is_cut():
    trunk, views = share_trunk([turn("What is it", "a"), turn("What are they", "b")])
    assert trunk == (Text("<|im_start|>user\n"), Image(0))
    assert views[0][0].text.startswith("What is it<|im_end|>")


def test_equal_conversations_keep_their_answers_and_predictors_apart():
    _, views = share_trunk([turn("q", "same"), turn("q", "same")])
    for view in views:
        assert flat(view) == flat([Text("assistant\n"), Text("same<|im_end|>", True), Text("\n")])


def test_learned_slots_stand_in_trunk_and_views_and_nothing_else_changes():
    given, written = Slots(2, source="given"), Slots((1, 3), marks=False, source="written")
    layout = Layout((b"x",), (Text("a"), given), ((Image(0), written), (Text("b"),)), targets=(0,), key="r1")
    found = with_learned_slots(layout)
    assert found == Layout(
        (b"x",), (Text("a"), Slots(2)), ((Image(0), Slots((1, 3), marks=False)), (Text("b"),)), targets=(0,), key="r1"
    )
