"""The facade of a model that is not there: its thoughts and answers follow from the question alone."""

import types
import zlib

import numpy as np

from latent_jax.inference.prompts import Thought

SLOTS, WIDTH = 3, 4


class Facade:
    """Thinks three vectors that are the question's alone, and is right where `right` says so of what stands there."""

    model = types.SimpleNamespace(head=None)
    thinks, writes = True, False

    def __init__(self, answers: dict[str, str], right):
        self.answers, self.right, self.asked = answers, right, []

    def think(self, conversations):
        return [[Thought(thought(question(turns)), thought(question(turns)))] for turns in conversations]

    def generate(self, conversations, tokens, thoughts=None, seed=0):
        thoughts = (
            [[own.inputs for own in each] for each in self.think(conversations)] if thoughts is None else thoughts
        )
        self.asked += [(question(turns), given) for turns, given in zip(conversations, thoughts, strict=True)]
        pairs = zip(conversations, thoughts, strict=True)
        return [self.answers[question(t)] if self.right(question(t), given) else "nothing" for t, given in pairs]


def question(turns) -> str:
    parts = turns[0]["content"]
    assert parts[-1] == {"type": "imagine"}
    return parts[-2]["text"].partition("\n")[0]


def thought(text: str) -> np.ndarray:
    return np.random.default_rng(zlib.crc32(text.encode())).normal(size=(SLOTS, WIDTH)).astype(np.float32)
