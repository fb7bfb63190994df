r"""VSP's maze navigation (Wu et al., 2024): a plan of moves on a FrozenLake map (S start, G goal, F safe, H hole).

The plan is simulated by VSP's own rules: a move off the map changes nothing, a hole loses, the goal wins and ends the
walk, and so does the hundredth move. `success` is theirs; `legal`: every move is a move and none leads into a hole;
`strict` also wants no move off the map and none after the goal. The reply's plan ("L,R,U,D") stands after
"Action plan: "; where the question itself asks for \boxed{}, and not for that, in the reply's last one. Else the reply
has no plan.
"""

import re
from collections.abc import Sequence

from latent_jax.benchmarks.estimates import Estimate, mean, present
from latent_jax.benchmarks.items import PLACE, ScoredItem, field, texts

SCORERS = ("official",)
ORIGINAL = "Visual-Spatial-Planning 6d74d7b"
SPLITS = ("test", "validation")
EMBEDDED = "scenes_vsp"
PUBLISHED: dict[str, int] = {}
MAX_NEW_TOKENS = 2048  # the official code sets no limit, and its prompt wants the map and every step spelled out
MOST_MOVES = 100  # FrozenLake-v1's limit
INSTRUCTION = (
    "Moves are L (left), R (right), U (up) and D (down). Do not step into a hole. Reply with the moves from the start "
    'to the goal, separated by commas, as in "Action plan: R,R,D".'
)
PROMPT = {"official": f"{{question}}\n{INSTRUCTION}  [unless the question says how to reply]"}
STEPS = {"L": (0, -1), "R": (0, 1), "U": (-1, 0), "D": (1, 0)}
_UNREADABLE = "?"
_MARKERS = ("Action plan: ", "Action Plan: ")
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
_IGNORED = str.maketrans("", "", "\"'\n.")


def check(question: dict, images: int) -> None:
    field(question, "question", str)
    if not isinstance(question.get("answer", ""), str | type(None)):
        raise ValueError(f"'answer' is {question['answer']!r}, expected a text")
    board = texts(question, "map")
    cells = "".join(board)
    if len({len(row) for row in board}) != 1 or set(cells) - set("SFHG") or cells.count("S") != 1 or "G" not in cells:
        raise ValueError(f"its map is {board!r}, expected rows of one length of S, F, H and G, with one S and a G")
    places = question["question"].count(PLACE)
    if not images or places not in (0, images):
        raise ValueError(f"has {images} images and {places} times {PLACE}, expected one for each")


def cluster(question: dict, key: str) -> str:
    return key


def prompt(question: dict, scorer: str) -> str:
    text = question["question"]  # Mirage's texts hold `<image>` and say how to reply
    told = "\\boxed" in text or _asks_plan(text)
    return text if told else f"{text}\n{INSTRUCTION}"


def _asks_plan(text: str) -> bool:
    return any(marker.strip() in text for marker in _MARKERS)


def answer(question: dict) -> str | None:
    """A plan that works, for orientation: any other one that does is right too."""
    return question.get("answer") or ""


def parse(reply: str, question: dict, scorer: str) -> str | None:
    """The moves, separated by commas; a last "?" stands for what is no move, and all that follows it."""
    for marker in _MARKERS:
        if marker in reply:
            reply = reply.partition(marker)[2]
            break
    else:
        asked = question.get("question", "")
        boxed = _BOXED.findall(reply) if "\\boxed" in asked and not _asks_plan(asked) else []
        reply = boxed[-1] if boxed else ""
    if not reply.strip():
        return None
    moves: list[str] = []
    for part in reply.split(","):
        move = part.translate(_IGNORED).strip()
        if move not in STEPS:
            return ",".join([*moves, _UNREADABLE])
        moves.append(move)
    return ",".join(moves)


def correct(parsed: str | None, question: dict, scorer: str) -> bool:
    return walk(parsed, question["map"])["success"]


def walk(parsed: str | None, board: Sequence[str]) -> dict[str, bool]:
    """{"success", "legal", "strict"} of a parsed plan."""
    place = next((r, row.index("S")) for r, row in enumerate(board) if "S" in row)
    moves = parsed.split(",") if parsed else []
    inside = True
    for number, move in enumerate(moves[:MOST_MOVES], 1):
        if move == _UNREADABLE:
            return {"success": False, "legal": False, "strict": False}
        row, column = (at + step for at, step in zip(place, STEPS[move], strict=True))
        if 0 <= row < len(board) and 0 <= column < len(board[0]):
            place = row, column
        else:
            inside = False
        cell = board[place[0]][place[1]]
        if cell == "H":
            return {"success": False, "legal": False, "strict": False}
        if cell == "G":
            return {"success": True, "legal": True, "strict": inside and number == len(moves)}
    return {"success": False, "legal": bool(moves), "strict": False}


def report(scored: Sequence[ScoredItem], scorer: str, seed: int = 0) -> dict[str, Estimate]:
    walks = [walk(one.parsed, one.item.question["map"]) for one in scored]
    clusters = [one.item.cluster for one in scored]
    return present({name: mean([each[name] for each in walks], clusters) for name in ("success", "legal", "strict")})
