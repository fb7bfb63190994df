"""Random layouts of every part there is, for property tests of what they become."""

import numpy as np
from hypothesis import strategies as st

from latent_jax.data.layout import Image, Read, Slots, Text

SIZES = ((28, 56), (56, 56), (84, 28))  # rows and columns of pixels; a merged token covers 28 x 28
WORDS = ("ball", " the red", "What?", "le", "ft", "\n", "naïve", "<|im_end|>", " ")
PICTURES = tuple(
    np.random.default_rng(seed).integers(0, 256, (*size, 3)).astype(np.uint8) for seed, size in enumerate(SIZES)
)
GRIDS = {index: (rows // 28, columns // 28) for index, (rows, columns) in enumerate(SIZES)}


def texts():
    words = st.lists(st.sampled_from(WORDS), min_size=1, max_size=3).map("".join)
    return st.builds(Text, words, st.booleans(), st.booleans())


def slots(sources=("learned", "written")):
    shapes = st.one_of(st.integers(0, 3), st.tuples(st.integers(1, 2), st.integers(1, 2)))
    source = st.sampled_from(sources)
    marked = st.builds(Slots, shapes, st.just(True), st.sampled_from(("", "open", "both")), source)
    return st.one_of(marked, st.builds(Slots, shapes, st.just(False), st.just(""), source))


@st.composite
def layouts(draw, sources=("learned", "written")):
    """Arguments of a Layout: trunk and up to two views; images 0 to 2, some of them shown, some of them targets.

    Not the Layout itself: the tests' type checker looks at items of sequences at random, which strategies may not.
    """
    parts = st.one_of(
        texts(),
        slots(sources),
        st.just(Read()),
        st.builds(Image, st.integers(0, 2), st.booleans(), st.booleans()),
    )
    some = st.lists(parts, max_size=4)
    trunk = (Text("<|im_start|>"), *draw(some))
    views = tuple(
        (*draw(st.just((Read(),)) | st.just(())), Text("x"), *draw(some)) for _ in range(draw(st.integers(0, 2)))
    )
    targets = tuple(draw(st.lists(st.integers(0, 2), max_size=2, unique=True)))
    return dict(images=PICTURES, trunk=trunk, views=views, targets=targets, key="r")
