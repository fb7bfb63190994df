"""Which choice does a reply name? Strict: what only might be a letter is none.

`choices` are the texts of the offered choices, A the first; results are places in it. The traps: the article ("A red
ball"), words that begin with an offered letter ("The second", "Because"), letters that are not offered, several.
"""

import re
from collections.abc import Sequence

ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MOST = len(ALPHABET)  # choices of a question: a further one has no letter
_MARKED = re.compile(r"(?<!\w)\(([A-Za-z])\)(?!\w)")
# '(A)' | 'A' on a line of its own; 'A.', 'A)' and 'A:' before a space or the end | 'B' before a space (A, I are words)
_FIRST = re.compile(r"\(([A-Za-z])\)(?!\w)|([A-Za-z])(?:\Z|(?=\n)|[.):](?=\s|\Z))|([B-HJ-Z])(?=\s)")
_SPOKEN = re.compile(r"\(([A-Za-z])\)(?!\w)|([A-Z])(?:\Z|(?=\n)|[.,;:)!](?=\s|\Z))|([B-HJ-Z])(?=\s)")
_WORD = re.compile(r"([AI])\s")
_JOINED = re.compile(r"(?:\s+|[,/&;]|(?:and|or)(?= ))*", re.IGNORECASE)
_ANNOUNCED = re.compile(r"\b(?:answer|option|choice)\b\s*(?:is\b)?\s*:?\s*", re.IGNORECASE)


def letter(place: int | None) -> str | None:
    return None if place is None else ALPHABET[place]


def offered(count: int) -> str:
    return ALPHABET[:count]


def marked(reply: str, count: int, *, small: bool = True) -> set[int]:
    """Places of the offered letters in parentheses of their own; `small`: '(a)' counts too."""
    found = _MARKED.findall(reply)
    return {ALPHABET.index(x) for x in (x.upper() if small else x for x in found) if x in ALPHABET[:count]}


def leading(reply: str, choices: Sequence[str]) -> int | None:
    """The letter that the reply begins with: 'B', '(b)', 'B.', 'B) red', 'B: red', 'B red'; 'A red' where A is 'red'.

    Of choices whose words hold their own letter, "A is closer", those words name it too. None where another offered
    letter follows it as a second answer, or stands in parentheses too. Asterisks are markup.
    """
    text = reply.replace("*", "").strip()
    if len(marked(text, len(choices))) > 1:
        return None
    if repeated := [place for place, choice in enumerate(choices) if " " in choice.strip() and _says(text, choice)]:
        return _repeated(text, choices, repeated)
    first = _FIRST.match(text)
    if first is None:
        return _worded(text, choices)
    place = _place(first, len(choices))
    if place is None or _says(text[first.end() :], choices[place]):
        return place
    joined = _JOINED.match(text, first.end())  # which always matches, if only nothing
    second = _FIRST.match(text, joined.end() if joined else first.end())
    return place if second is None or _place(second, len(choices)) in (None, place) else None


def announced(reply: str, choices: Sequence[str]) -> int | None:
    """The one letter that follows 'answer', 'option' or 'choice' ('is', ':'); None where there are several."""
    text = reply.replace("*", "")
    places = set()
    for match in _ANNOUNCED.finditer(text):
        spoken = _SPOKEN.match(text, match.end())
        if spoken:
            places |= {_place(spoken, len(choices))} - {None}
        elif _WORD.match(text, match.end()):
            # Read as an article it is None, and no reason to take another letter for the only one.
            places.add(_worded(text[match.end() :], choices))
    return places.pop() if len(places) == 1 else None


def only_marked(reply: str, choices: Sequence[str], *, small: bool = True) -> int | None:
    """The one offered letter in parentheses; None where there are several, or where the reply begins with another
    letter: "B is closer than (A)." does not answer A."""
    places = marked(reply, len(choices), small=small)
    rest = _MARKED.sub("", reply).replace("*", "").strip()
    first = _SPOKEN.match(rest)
    begun = _place(first, len(choices)) if first else leading(rest, choices)
    return places.pop() if len(places) == 1 and begun in (None, *places) else None


def _place(match: re.Match, count: int) -> int | None:
    found = next(filter(None, match.groups())).upper()
    return ALPHABET.index(found) if found in ALPHABET[:count] else None


def _worded(text: str, choices: Sequence[str]) -> int | None:
    """'A red ball' is choice A where that is 'red ball' or 'A red ball'; else its A is an article."""
    match = _WORD.match(text)
    place = _place(match, len(choices)) if match else None
    if match is None or place is None:
        return None
    whole = choices[place].strip()
    return place if _says(text[1:], whole) or (whole.startswith(match[0]) and _says(text, whole)) else None


def _repeated(text: str, choices: Sequence[str], places: Sequence[int]) -> int | None:
    """The choice whose own words the reply begins with, where they begin with its letter ("A is closer") and no other
    choice stands behind it."""
    place = max(places, key=lambda place: len(choices[place].strip()))
    own = choices[place].strip()
    if not own.casefold().startswith(f"{ALPHABET[place].casefold()} "):
        first = _FIRST.match(text)  # 'B is closer' as the words of choice A names neither
        return None if first and _place(first, len(choices)) not in (None, place) else _worded(text, choices)
    rest = text[len(own) :]
    others = [other.strip() for number, other in enumerate(choices) if number != place and len(other.strip()) > 1]
    if marked(text, len(choices)) - {place} or any(
        re.search(rf"(?<!\w){re.escape(other)}(?!\w)", rest, re.IGNORECASE) for other in others
    ):
        return None
    return place


def _says(text: str, choice: str) -> bool:
    """Does the text begin with the choice's words?"""
    choice = choice.strip().casefold()
    return bool(choice) and re.match(re.escape(choice) + r"(?!\w)", text.strip().casefold()) is not None
