"""Layouts of every part, laid out, against what their parts say position by position."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_jax.data.chat import Processor
from latent_jax.data.layout import Image, Layout, Read, Slots, Text, share_trunk
from latent_jax.errors import UserError
from tests.data import tiny_processor
from tests.reference import laid_out, layouts


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return Processor.from_directory(tiny_processor.write(tmp_path_factory.mktemp("tiny")))


def merged_index(processor, example, layout):
    """{(image, row, column): merged token}, told by the place of each merged token's first patch; and the images."""
    shown = sorted(
        {p.index for parts in (layout.trunk, *layout.views) for p in parts if isinstance(p, Image)} | {*layout.targets}
    )
    found = {}
    for token, (image, (row, column)) in enumerate(zip(example.patch_image[::4], example.patch_positions[::4])):
        found[shown[image - 1], row // 2, column // 2] = token
    return found, shown


def check(processor, layout):
    example = processor.lay_out(layout)
    want, reads = laid_out.read(layout, processor.tokenizer, layouts.GRIDS)
    merged, shown = merged_index(processor, example, layout)
    assert example.tokens.tolist() == [p.token for p in want]
    assert example.view_ids.tolist() == [p.view for p in want]
    assert example.positions.T.tolist() == [list(p.axes) for p in want]
    assert example.reads.tolist() == reads
    followers = [after if after and after.view == p.view else None for p, after in zip(want, [*want[1:], None])]
    assert example.targets.tolist() == [after.token if after else 0 for after in followers]
    assert example.loss_weights.tolist() == [float(bool(after and after.loss)) for after in followers]
    slots = [t for t, p in enumerate(want) if p.what and p.what[0] in ("slot", "written")]
    assert example.slots.tolist() == slots
    for t, position in enumerate(want):
        match position.what:
            case ("image", *cell):
                number = merged[tuple(cell)]
            case ("slot", s):
                number = len(merged) + s
            case ("given", g):
                number = len(merged) + len(slots) + g
            case _:
                number = -1
        assert example.feature_index[t] == number, (t, position)
    asked = {
        "feature_weights": [float(p.regressed) for p in want],
        "hidden": [p.hidden for p in want],
        "late": [p.late for p in want],
    }
    needed = {"feature_weights": asked["feature_weights"], "hidden": asked["hidden"], "late": asked["hidden"]}
    for name, values in asked.items():
        found = getattr(example, name)
        assert (found is not None) == any(needed[name])
        assert found is None or found.tolist() == values
    assert example.target_image.tolist() == [shown.index(target) + 1 for target in layout.targets]
    assert example.target_grid.tolist() == [list(layouts.GRIDS[target]) for target in layout.targets]


@given(shown=layouts.layouts(sources=("learned", "given", "written")))
@settings(max_examples=50, deadline=None)
def test_a_laid_out_layout_is_what_its_parts_say(processor, shown):
    check(processor, Layout(**shown))


@given(shown=layouts.layouts())
@settings(max_examples=10, deadline=None)
def test_without_decoding_there_is_everything_but_the_pixels(processor, shown):
    decoded, sized = processor.lay_out(Layout(**shown)), processor.lay_out(Layout(**shown), decode=False)
    for name in ("tokens", "feature_index", "slots", "reads", "target_image", "target_grid", "loss_weights"):
        np.testing.assert_array_equal(getattr(decoded, name), getattr(sized, name))


@given(
    st.lists(
        st.lists(st.one_of(layouts.texts(), layouts.slots(), st.just(Read())), max_size=4), min_size=2, max_size=3
    ),
    st.lists(st.one_of(layouts.texts(), st.just(Read())), max_size=3),
)
@settings(max_examples=40, deadline=None)
def test_trunk_and_view_have_the_tokens_of_the_conversation(processor, tails, head):
    """Whatever parts conversations are of: neither a Read nor a change of flags is a place to cut a word."""
    begin = [Text("<|im_start|>"), *head]
    conversations = [[*begin, *tail, Text("<|im_end|>")] for tail in tails]
    trunk, views = share_trunk(conversations)
    if not trunk:
        return
    for conversation, view in zip(conversations, views, strict=True):
        whole = laid_out.read(Layout(trunk=tuple(conversation)), processor.tokenizer, {})[0]
        example = processor.lay_out(Layout(trunk=trunk, views=(view,)))
        assert example.tokens.tolist() == [p.token for p in whole]
        assert example.positions.T.tolist() == [list(p.axes) for p in whole]
        lost = [t for t, p in enumerate(whole) if p.loss]
        assert (np.flatnonzero(example.loss_weights) + 1).tolist() == lost


def test_a_read_cuts_no_word(processor):
    whole, cut = Layout(trunk=(Text("the ball left"),)), Layout(trunk=(Text("the ba"), Read(), Text("ll left")))
    example = processor.lay_out(cut)
    assert example.tokens.tolist() == processor.lay_out(whole).tokens.tolist()
    read = processor.tokenizer.decode(example.tokens[: example.reads[0] + 1])
    assert "the ba" in read and not processor.tokenizer.decode(example.tokens[: example.reads[0]]).endswith("ba")


def test_the_marks_of_spoken_images_are_predicted_where_asked(processor):
    image = {"type": "image", "image": layouts.PICTURES[1]}
    talk = [
        {"role": "user", "content": [image, {"type": "text", "text": "Draw."}]},
        {"role": "assistant", "content": [{"type": "text", "text": "So"}, image, {"type": "text", "text": "."}]},
    ]
    shown = processor.render(talk, image_loss=True)
    assert [part for part in shown.trunk if isinstance(part, Image)] == [Image(0), Image(0, loss=True)]
    example = processor.lay_out(shown)
    opens = np.flatnonzero(example.tokens == processor.vision_marks[0])[1]
    assert example.loss_weights[opens - 1] == 1 and not example.loss_weights[opens : opens + 5].any()
    assert np.flatnonzero(example.feature_weights).tolist() == [*range(opens + 1, opens + 5)]
    plain = processor.lay_out(processor.render(talk))
    assert plain.feature_weights is None and plain.loss_weights[opens - 1] == 0


def test_parts_that_cannot_be_are_refused(processor):
    with pytest.raises(ValueError, match="no marks to predict"):
        Slots(3, marks=False, loss="open")
    with pytest.raises(ValueError, match="'r7': a Read stands before"):
        processor.lay_out(Layout(trunk=(Read(), Text("a")), key="r7"))
    with pytest.raises(ValueError, match="starts with loss"):
        processor.lay_out(Layout(trunk=(Text("a"),), views=((Slots(2, loss="open"),),)))
    with pytest.raises(UserError, match="target 3 points outside"):
        Layout(images=(b"x",), targets=(0, 3))
