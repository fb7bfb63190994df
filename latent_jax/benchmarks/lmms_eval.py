"""What lmms-eval reads in a reply, as of one named version: ours counts a letter only where that version reads it too.

A later version may read otherwise (the BLINK parser of August 2026 takes the letter of "The correct answer is (B)."),
so numbers under the scorer `lmms_eval` are comparable to this version's. Results are letters, None for no letter.
"""

import re

VERSION = "lmms-eval 75571cf"
_OPTION = re.compile(r"\([A-D]\)\s*([^()]+?)(?=\s*\([A-D]\)|$)")
# In the order in which they are tried; the reply is in upper case.
_VSTAR = [
    re.compile(pattern)
    for pattern in (
        r"^([A-D])",
        r"(?:ANSWER|CHOICE|OPTION)(?:\s+IS)?[\s:]+([A-D])",
        r"\(([A-D])\)",
        r"([A-D])\s*[.)|\]]",
        r"(?:^|\s)([A-D])(?:\s|$)",
    )
]
_MMVP = [
    re.compile(pattern)
    for pattern in (
        r"^\(?([AB])\)?\.?\s*$",
        r"^\(?([AB])\)?[.\s]",
        r"ANSWER\s+IS\s+\(?([AB])",
        r"OPTION\s+\(?([AB])",
        r"([AB])\)?(?:\s|$)",
        r"^([AB])",
    )
]


def blink(reply: str) -> str | None:
    """The first letter of the reply, whatever word it begins; nothing but space and "(" may stand before it."""
    match = re.match(r"[(\s]*([A-Z])", reply.strip(), re.IGNORECASE)
    return match[1].upper() if match else None


def vstar(reply: str) -> str | None:
    """The first pattern of its list that is found anywhere; else the reply's only letter of A to D."""
    text = reply.strip().upper()
    found = _first(_VSTAR, text)
    letters = re.findall(r"[A-D]", text)
    return found or (letters[0] if len(letters) == 1 else None)


def mmvp(reply: str) -> str | None:
    return _first(_MMVP, reply.strip().upper())


def vstar_text(text: str) -> str:
    """The published text with its options as lines "A. ..."; what follows the last option stays part of it."""
    options = _OPTION.findall(text)
    if not options:
        return text
    lines = [f"{letter}. {option.strip()}" for letter, option in zip("ABCD", options, strict=False)]
    return "\n".join([text.partition("(A)")[0].strip(), *lines])


def agreed(letter: str | None, theirs: str | None) -> str | None:
    """Our letter where theirs is the same."""
    return letter if letter == theirs else None


def _first(patterns: list[re.Pattern], text: str) -> str | None:
    return next((match[1] for pattern in patterns if (match := pattern.search(text))), None)
