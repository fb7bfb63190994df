"""Which letter lmms-eval (75571cf) reads in a reply, once more: a reader that walks forward, one character at a time.

Written from the rules in words (latent_jax/benchmarks/lmms_eval.py's docstring), not from its code: there a rule looks
at both sides of a letter, here it begins at every place of the text and walks until it stands on one.
"""

from collections.abc import Iterator


def blanks(text: str, at: int) -> int:
    """Where the blanks that begin at `at` end."""
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def words(text: str, at: int, *wanted: str) -> int | None:
    """Where the words that begin at `at` end, at least one blank behind each of them."""
    for word in wanted:
        if text[at : at + len(word)] != word:
            return None
        after = blanks(text, at + len(word))
        if after == at + len(word):
            return None
        at = after
    return at


def skip(text: str, at: int, character: str) -> int:
    return at + 1 if text[at : at + 1] == character else at


def on_letter(text: str, at: int | None, letters: str) -> str:
    """The letter that stands at a place, '' for none."""
    return text[at] if at is not None and at < len(text) and text[at] in letters else ""


def blank_or_end(text: str, at: int) -> bool:
    return at >= len(text) or text[at].isspace()


def vstar_rules(text: str) -> Iterator[list[str]]:
    """What each rule finds, from left to right."""
    places = range(len(text))
    yield [on_letter(text, 0, "ABCD")]
    found = []
    for at in places:
        for word in ("ANSWER", "CHOICE", "OPTION"):
            if text[at : at + 6] == word:
                end = at + 6
                spaced = blanks(text, end)
                if spaced > end and text[spaced : spaced + 2] == "IS":
                    end = spaced + 2
                after = end
                while after < len(text) and (text[after] == ":" or text[after].isspace()):
                    after += 1
                if after > end:
                    found.append(on_letter(text, after, "ABCD"))
    yield found
    yield [on_letter(text, at + 1, "ABCD") for at in places if text[at] == "(" and text[at + 2 : at + 3] == ")"]
    yield [on_letter(text, at, "ABCD") for at in places if text[(end := blanks(text, at + 1)) : end + 1] in [*".)]"]]
    yield [
        on_letter(text, at, "ABCD")
        for at in places
        if (at == 0 or text[at - 1].isspace()) and blank_or_end(text, at + 1)
    ]
    offered = [character for character in text if character in "ABCD"]
    yield offered if len(offered) == 1 else []


def mmvp_rules(text: str) -> Iterator[list[str]]:
    places = range(len(text))
    first = skip(text, 0, "(")
    closed = skip(text, first + 1, ")")
    yield [on_letter(text, first, "AB")] if skip(text, closed, ".") >= len(text) else []
    yield (
        [on_letter(text, first, "AB")] if closed < len(text) and (text[closed] == "." or text[closed].isspace()) else []
    )
    for wanted in (("ANSWER", "IS"), ("OPTION",)):
        ends = [words(text, at, *wanted) for at in places]
        yield [on_letter(text, skip(text, end, "("), "AB") for end in ends if end is not None]
    yield [on_letter(text, at, "AB") for at in places if blank_or_end(text, skip(text, at + 1, ")"))]
    yield [on_letter(text, 0, "AB")]


def blink(reply: str) -> str:
    for character in reply:
        if character != "(" and not character.isspace():
            return character.upper() if character.isascii() and character.isalpha() else ""
    return ""


def vstar(reply: str) -> str:
    return next((letter for found in vstar_rules(reply.strip().upper()) for letter in found if letter), "")


def mmvp(reply: str) -> str:
    return next((letter for found in mmvp_rules(reply.strip().upper()) for letter in found if letter), "")


def vstar_text(text: str) -> str:
    """The published text of a V* question with its options as lines."""
    options, at = [], 0
    while at < len(text):
        if text[at] == "(" and text[at + 1 : at + 3] in ("A)", "B)", "C)", "D)"):
            start = end = at + 3
            while end < len(text) and text[end] not in "()":
                end += 1
            if end > start and (end == len(text) or text[end : end + 3] in ("(A)", "(B)", "(C)", "(D)")):
                options.append(text[start:end].strip())
        at += 1
    if not options:
        return text
    question = text[: text.find("(A)")] if "(A)" in text else text
    return "\n".join([question.strip(), *("ABCD"[n] + ". " + option for n, option in enumerate(options[:4]))])
