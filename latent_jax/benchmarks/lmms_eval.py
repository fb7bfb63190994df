"""What lmms-eval reads in a reply, as of one named version: ours counts a letter only where that version reads it too.

Written from what that version accepts. A reply is stripped, its case does not matter, and a reader's rules are tried in
order: the first one that some letter satisfies decides, by the first such letter. (letter: one of A to D, of MMVP's A
and B; blank: any white space; a letter counts inside words too.)

    BLINK   1  the first character that is no blank and no "(", if it is any of A to Z
    V*      1  letter at the beginning
            2  "answer" | "choice" | "option", [blanks "is"], blanks or colons, letter
            3  "(" letter ")"
            4  letter, [blanks], "." | ")" | "]"
            5  letter between blanks or ends
            6  the only letter of the reply
    MMVP    1  nothing but ["("] letter [")"] ["."]
            2  at the beginning: ["("] letter [")"], "." | blank
            3  "answer" blanks "is" blanks ["("] letter
            4  "option" blanks ["("] letter
            5  letter [")"], blank or the end
            6  letter at the beginning

Later versions may read otherwise (BLINK's reader takes the letter of "The correct answer is (B)." since #1435 of August
2026), so numbers under the scorer `lmms_eval` are comparable to this version's. Results are letters, None for none.
"""

import itertools
from collections.abc import Callable, Sequence

from latent_jax.benchmarks.letters import ALPHABET

VERSION = "lmms-eval 75571cf"
_OFFERED = "ABCD"

# A rule: (what stands before a letter, what stands behind it) -> does the letter count?
_Rule = Callable[[str, str], bool]


def blink(reply: str) -> str | None:
    """The first letter of the reply, whatever word it begins; nothing but blanks and "(" may stand before it."""
    first = next(itertools.dropwhile(lambda character: character == "(" or character.isspace(), reply), "").upper()
    return first if first and first in ALPHABET else None


def vstar(reply: str) -> str | None:
    text = reply.strip().upper()
    only = [character for character in text if character in _OFFERED]
    return _first(text, _OFFERED, _VSTAR) or (only[0] if len(only) == 1 else None)


def mmvp(reply: str) -> str | None:
    return _first(reply.strip().upper(), "AB", _MMVP)


def vstar_text(text: str) -> str:
    """The published text with its options as lines "A. ..."; what follows the last option stays part of it.

    An option is what stands behind "(A)" up to the next such mark or the end; with other parentheses in it it is none.
    """
    marks = {at for at in range(len(text) - 2) if text[at] == "(" and text[at + 1] in _OFFERED and text[at + 2] == ")"}
    options = []
    for start in sorted(at + len("(A)") for at in marks):
        end = next((at for at in range(start, len(text)) if text[at] in "()"), len(text))
        if start < end and (end in marks or end == len(text)):
            options.append(text[start:end].strip())
    if not options:
        return text
    lines = [f"{letter}. {option}" for letter, option in zip(_OFFERED, options, strict=False)]
    return "\n".join([text.partition("(A)")[0].strip(), *lines])


def agreed(letter: str | None, theirs: str | None) -> str | None:
    """Our letter where theirs is the same."""
    return letter if letter == theirs else None


def _first(text: str, offered: str, rules: Sequence[_Rule]) -> str | None:
    places = [place for place, character in enumerate(text) if character in offered]
    for rule in rules:
        for place in places:
            if rule(text[:place], text[place + 1 :]):
                return text[place]
    return None


def _begins(text: str, ends: str) -> bool:
    """Does the text begin with a blank or one of these characters?"""
    return text[:1].isspace() or (text != "" and text[0] in ends)


def _behind(text: str, *words: str) -> bool:
    """Does the text end with these words, each with blanks behind it?"""
    for word in reversed(words):
        bare = text.rstrip()
        if bare == text or not bare.endswith(word):
            return False
        text = bare.removesuffix(word)
    return True


def _announced(before: str) -> bool:
    """V*'s second rule: blanks or colons at the end, and before them the word, with or without its "is"."""
    bare = before
    while bare[-1:] == ":" or bare[-1:].isspace():
        bare = bare[:-1]
    words = "ANSWER", "CHOICE", "OPTION"
    return bare != before and (
        bare.endswith(words) or (bare.endswith("IS") and any(_behind(bare[:-2], word) for word in words))
    )


_VSTAR: tuple[_Rule, ...] = (
    lambda before, after: before == "",
    lambda before, after: _announced(before),
    lambda before, after: before.endswith("(") and after.startswith(")"),
    lambda before, after: after.lstrip()[:1] in (".", ")", "]"),
    lambda before, after: (before == "" or before[-1].isspace()) and (after == "" or after[0].isspace()),
)
_MMVP: tuple[_Rule, ...] = (
    lambda before, after: before in ("", "(") and after in ("", ")", ".", ")."),
    lambda before, after: before in ("", "(") and _begins(after.removeprefix(")"), "."),
    lambda before, after: _behind(before.removesuffix("("), "ANSWER", "IS"),
    lambda before, after: _behind(before.removesuffix("("), "OPTION"),
    lambda before, after: after in ("", ")") or _begins(after.removeprefix(")"), ""),
    lambda before, after: before == "",
)
