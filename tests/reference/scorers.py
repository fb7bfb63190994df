"""The benchmarks' rules once more, the slow obvious way: one character or one question at a time.

No pattern matching.

Written from the rules, before the scorers were; every number is a Fraction (of 1, not percent).
"""

from collections import Counter
from fractions import Fraction

from tests.reference import lmms_letters

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
PUNCTUATION = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"


def share(values) -> Fraction | None:
    values = [Fraction(value) for value in values]
    return sum(values) / len(values) if values else None


# ------------------------------------------------------------ letters


def is_word(character: str) -> bool:
    return character.isalnum() or character == "_"


def parenthesised(text: str, count: int, small: bool = True) -> set[int]:
    """Places of the offered letters that stand in parentheses of their own."""
    found = set()
    for i in range(len(text) - 2):
        before = text[i - 1] if i else " "
        after = text[i + 3] if i + 3 < len(text) else " "
        if text[i] != "(" or text[i + 2] != ")" or is_word(before) or is_word(after):
            continue
        letter = text[i + 1].upper() if small and text[i + 1].isascii() else text[i + 1]
        if letter in LETTERS[:count]:
            found.add(LETTERS.index(letter))
    return found


def first_letter(text: str, count: int) -> tuple[int, str] | None:
    """(place, what follows it) where the text begins with a letter that is marked as one: '(A', 'A.', 'A' alone."""
    opened = text.startswith("(")
    text = text[1:] if opened else text
    if not text or not text[0].isascii() or text[0].upper() not in LETTERS[:count]:
        return None
    place, rest = LETTERS.index(text[0].upper()), text[1:]
    if opened:
        if rest.startswith(")") and (len(rest) == 1 or not is_word(rest[1])):
            return place, rest[1:]
        return None
    if rest == "" or rest[0] == "\n":
        return place, rest
    if rest[0] in ".):" and (len(rest) == 1 or rest[1].isspace()):
        return place, rest[1:]
    if text[0] in LETTERS and text[0] not in "AI" and rest[0].isspace():
        return place, rest
    return None


def says(text: str, choice: str) -> bool:
    said, choice = text.strip().casefold(), choice.strip().casefold()
    return choice != "" and said.startswith(choice) and not is_word((said + " ")[len(choice)])


def leading(reply: str, choices: list[str]) -> int | None:
    text = reply.replace("*", "").strip()
    if len(parenthesised(text, len(choices))) > 1:
        return None
    found = first_letter(text, len(choices))
    if found is None:
        # 'A red ball': the article, unless the words are those of choice A.
        if len(text) < 2 or text[0] not in LETTERS[: len(choices)] or not text[1].isspace():
            return None
        place = LETTERS.index(text[0])
        return place if says(text[1:], choices[place]) else None
    place, rest = found
    if says(rest, choices[place]):
        return place
    while True:
        rest = rest.lstrip()
        word = next((word for word in ("and", "or") if rest.lower().startswith(word + " ")), None)
        if word:
            rest = rest[len(word) :]
        elif rest[:1] and rest[0] in ",/&;":
            rest = rest[1:]
        else:
            break
    another = first_letter(rest, len(choices))
    return None if another and another[0] != place else place


def announced(reply: str, choices: list[str]) -> int | None:
    """The one letter after 'answer', 'option' or 'choice' (is, :)."""
    text, found = reply.replace("*", ""), set()
    for word in ("answer", "option", "choice"):
        lower, at = text.lower(), -1
        while (at := lower.find(word, at + 1)) >= 0:
            if (at and is_word(text[at - 1])) or is_word((text + " ")[at + len(word)]):
                continue
            rest = text[at + len(word) :].lstrip()
            if rest[:2].lower() == "is" and not is_word((rest + " ")[2]):
                rest = rest[2:].lstrip()
            if rest.startswith(":"):
                rest = rest[1:].lstrip()
            letter = spoken(rest, choices)
            if letter != "nothing":
                found.add(letter)
    return found.pop() if len(found) == 1 else None


def spoken(text: str, choices: list[str]) -> int | None | str:
    """The letter that a sentence goes on with; "nothing", or None where it may be the word A or I."""
    if text.startswith("("):
        found = first_letter(text, len(choices))
        return found[0] if found else "nothing"
    if not text or text[0] not in LETTERS:
        return "nothing"
    rest = text[1:]
    word = text[0] in "AI" and rest[:1].isspace() and rest[0] != "\n"
    if word:
        offered = text[0] in LETTERS[: len(choices)]
        place = LETTERS.index(text[0])
        return place if offered and says(rest, choices[place]) else None
    if text[0] not in LETTERS[: len(choices)]:
        return "nothing"
    if rest == "" or rest[0].isspace() or (rest[0] in ".,;:)!" and (len(rest) == 1 or rest[1].isspace())):
        return LETTERS.index(text[0])
    return "nothing"


def only_parenthesised(reply: str, choices: list[str], small: bool = True) -> int | None:
    """The single letter in parentheses, unless what is left without parentheses begins with another."""
    found = parenthesised(reply, len(choices), small)
    if len(found) != 1:
        return None
    kept = ""
    while reply:
        alone = not kept[-1:] or not is_word(kept[-1])
        letter = reply[:1] == "(" and reply[2:3] == ")" and reply[1].isascii() and reply[1].isalpha()
        if letter and alone and not is_word(reply[3:4] or " "):
            kept, reply = kept + "\0", reply[3:]
        else:
            kept, reply = kept + reply[0], reply[1:]
    kept = kept.replace("\0", "").replace("*", "").strip()
    begun = spoken(kept, choices)
    if begun == "nothing" or begun is None:
        begun = leading(kept, choices)
    return found.pop() if begun is None or begun in found else None


def one_of_two_letters(reply: str, choices: list[str], scorer: str) -> int | None:
    """V* and MMVP: the reply's beginning; then (lmms_eval) what it announces; then its only letter in parentheses."""
    found = leading(reply, choices)
    if found is None and scorer == "lmms_eval":
        found = announced(reply, choices)
    if found is None:
        found = only_parenthesised(reply, choices)
    if scorer == "lmms_eval":
        theirs = lmms_letters.vstar(reply) if len(choices) > 2 else lmms_letters.mmvp(reply)
        return as_lmms_eval_too(found, theirs)
    return found


def as_lmms_eval_too(place: int | None, theirs: str) -> int | None:
    """The place where lmms-eval reads the same letter."""
    return place if place is not None and LETTERS[place] == theirs else None


# ------------------------------------------------------------ GQA


def gqa_text(reply: str, scorer: str) -> str:
    reply = reply.strip()
    if scorer == "official":
        while reply.endswith("."):
            reply = reply[:-1]
        return reply.lower()
    return "".join(character for character in reply.lower() if character not in PUNCTUATION)


def gqa_right(question: dict, reply: str, scorer: str) -> bool:
    gold = question["answer"]
    if scorer == "lmms_eval":
        gold = "".join(character for character in gold.lower() if character not in PUNCTUATION)
    return gqa_text(reply, scorer) == gold


def gqa(questions: dict[str, dict], replies: dict[str, str], scorer: str, choices: dict | None = None) -> dict:
    right = {i: gqa_right(question, replies[i], scorer) for i, question in questions.items()}
    balanced = {i: question for i, question in questions.items() if question["isBalanced"]}
    query = {i for i, question in balanced.items() if question["types"]["structural"] == "query"}
    found = {
        "accuracy": share(right[i] for i in balanced),
        "open": share(right[i] for i in query),
        "binary": share(right[i] for i in balanced.keys() - query),
    }
    if scorer == "lmms_eval":
        return {name: value for name, value in found.items() if value is not None}
    consistencies = []
    for i, question in balanced.items():
        entailed = [other for other in question["entailed"] if other != i and other in questions]
        if right[i] and entailed:
            consistencies.append(share(right[other] for other in entailed))
    found["consistency"] = share(consistencies)
    groups = {question["groups"]["global"] for question in balanced.values()} - {None}
    total, weight = Fraction(0), 0
    for group in groups:
        members = [i for i, question in balanced.items() if question["groups"]["global"] == group]
        gold = Counter(questions[i]["answer"] for i in members)
        said = Counter(gqa_text(replies[i], scorer) for i in members)
        chi = sum(Fraction((said[answer] - count) ** 2, count) for answer, count in gold.items())
        total, weight = total + chi * len(members), weight + len(members)
    # The official report prints chi-square / 100; ours is in percent like the rest.
    found["distribution"] = total / weight / 10_000 if weight else None
    if choices is not None:
        for kind in ("valid", "plausible"):
            values = []
            for i, question in balanced.items():
                allowed = choices[i][kind]
                if "Common" in question["types"]["detailed"]:
                    allowed = ["color", "material", "shape"]
                values.append(gqa_text(replies[i], scorer) in allowed)
            found[{"valid": "validity", "plausible": "plausibility"}[kind]] = share(values)
    return {name: value for name, value in found.items() if value is not None}


# ------------------------------------------------------------ ScienceQA


def scienceqa_letter(question: dict, reply: str, scorer: str) -> int | None:
    offered, reply = LETTERS[: len(question["choices"])], reply.strip()
    if scorer == "lmms_eval":
        if len(reply) == 1 and reply.isascii():
            said = reply.upper()
        else:
            said = reply[0] if len(reply) >= 2 and reply[1] == "." else None
    elif reply in list("ABCDE"):
        said = reply
    elif len(reply) >= 3 and reply[0] in "ABCDE" and reply[1:3] == ". ":
        said = reply[0]
    else:
        phrase, after, end = "The answer is ", [], 0
        for at in range(len(reply)):
            if at >= end and reply[at : at + len(phrase)] == phrase:
                letter, rest = reply[at + len(phrase) :][:1], reply[at + len(phrase) + 1 :]
                if letter and letter in LETTERS and rest and rest[0] != "\n":
                    after.append(letter)
                    end = at + len(phrase) + 2  # the pattern's last full stop takes any character with it
        said = after[0] if len(after) == 1 else None
    return offered.index(said) if said and said in offered else None


def scienceqa(rows: list[tuple[dict, bool, str]], scorer: str) -> dict:
    """rows: (question, has an image, reply)."""
    judged = [
        (question, image, scienceqa_letter(question, r, scorer) == question["answer"]) for question, image, r in rows
    ]
    young = {f"grade{n}" for n in range(1, 7)}
    groups = {
        "NAT": lambda q, image: q["subject"] == "natural science",
        "SOC": lambda q, image: q["subject"] == "social science",
        "LAN": lambda q, image: q["subject"] == "language science",
        "TXT": lambda q, image: q["hint"] != "",
        "IMG": lambda q, image: image,
        "NO": lambda q, image: not image and q["hint"] == "",
        "G1-6": lambda q, image: q["grade"] in young,
        "G7-12": lambda q, image: q["grade"] not in young,
        "Avg": lambda q, image: True,
    }
    found = {name: share(right for q, image, right in judged if test(q, image)) for name, test in groups.items()}
    return {name: value for name, value in found.items() if value is not None}


# ------------------------------------------------------------ BLINK


def blink_letter(question: dict, reply: str, scorer: str) -> int | None:
    choices = question["choices"]
    if scorer == "official":
        text = reply.strip()
        if len(text) == 1 and text in LETTERS[: len(choices)]:
            return LETTERS.index(text)
        for part in (text.split("\n\n")[-1], text):
            words = {letter for letter in LETTERS[: len(choices)] if f"({letter})" in part.split()}
            if len(words) == 1:
                return LETTERS.index(words.pop())
        if (place := leading(reply, choices)) is not None:
            return place
        for part in (text.split("\n\n")[-1], text):
            if (place := only_parenthesised(part, choices, small=False)) is not None:
                return place
        return None
    return as_lmms_eval_too(leading(reply, choices), lmms_letters.blink(reply))


def blink(rows: list[tuple[dict, str]], scorer: str) -> dict:
    judged = [
        (
            q["sub_task"],
            "(" + LETTERS[place] + ")" == q["answer"] if (place := blink_letter(q, r, scorer)) is not None else False,
        )
        for q, r in rows
    ]
    tasks = sorted({task for task, _ in judged})
    found = {task: share(right for its, right in judged if its == task) for task in tasks}
    return {**found, "macro": share(found[task] for task in tasks), "micro": share(right for _, right in judged)}


# ------------------------------------------------------------ VSP


def vsp_moves(reply: str) -> list[str]:
    """The comma-separated moves after 'Action plan:', cleaned; '?' for the first thing that is none, and its end."""
    for marker in ("Action plan: ", "Action Plan: "):
        if marker in reply:
            reply = reply[reply.index(marker) + len(marker) :]
            break
    else:
        return []
    if reply.strip() == "":
        return []
    moves = []
    for part in reply.split(","):
        for character in "\"'\n.":
            part = part.replace(character, "")
        part = part.strip()
        if part not in ("L", "R", "U", "D"):
            return [*moves, "?"]
        moves.append(part)
    return moves


def vsp_walk(board: list[str], moves: list[str]) -> dict:
    """FrozenLake without slipping: the edge holds, a hole or the goal ends the walk."""
    row, column = next((r, c) for r, line in enumerate(board) for c, cell in enumerate(line) if cell == "S")
    inside = True
    for number, move in enumerate(moves):
        if move == "?":
            return {"success": False, "legal": False, "strict": False}
        r, c = row + {"U": -1, "D": 1}.get(move, 0), column + {"L": -1, "R": 1}.get(move, 0)
        if 0 <= r < len(board) and 0 <= c < len(board[0]):
            row, column = r, c
        else:
            inside = False
        if board[row][column] == "H":
            return {"success": False, "legal": False, "strict": False}
        if board[row][column] == "G":
            return {"success": True, "legal": True, "strict": inside and number == len(moves) - 1}
    return {"success": False, "legal": bool(moves), "strict": False}
