"""Frozen lakes: maps over S (start), F (ice), H (hole), G (goal), one string a row, and ways over them."""

import collections
from typing import Any

_TILES = {1: "S", 2: "G", -1: "H", 0: "F"}
MOVES = {"L": (0, -1), "D": (1, 0), "R": (0, 1), "U": (-1, 0)}  # rows down, columns right


def read_map(description: Any) -> list[str]:
    """Rows over S F H G. Raises ValueError where it is no rectangle with one start and one goal."""
    if not isinstance(description, list) or not description or not all(isinstance(row, list) for row in description):
        raise ValueError(f"map_desc {str(description)[:40]}, expected rows of 1, 2, -1 and 0")
    if any(type(tile) is not int or tile not in _TILES for row in description for tile in row):
        raise ValueError(f"map_desc {str(description)[:40]}, expected rows of 1, 2, -1 and 0")
    rows = ["".join(_TILES[tile] for tile in row) for row in description]
    text = "".join(rows)
    if len({len(row) for row in rows}) > 1 or text.count("S") != 1 or text.count("G") != 1:
        raise ValueError(f"map {'/'.join(rows)} is no rectangle with one start and one goal")
    return rows


def shortest(rows: list[str]) -> str:
    """A shortest way from S to G over ice, as "R,R,D"; of equal ones the first in the order L, D, R, U; "" for none."""
    tiles = {(r, c): tile for r, row in enumerate(rows) for c, tile in enumerate(row)}
    ways = collections.deque([(place, "") for place, tile in tiles.items() if tile == "S"])
    seen = {place for place, _ in ways}
    while ways:
        (r, c), way = ways.popleft()
        if tiles[r, c] == "G":
            return ",".join(way)
        for move, (down, right) in MOVES.items():
            place = r + down, c + right
            if tiles.get(place, "H") != "H" and place not in seen:
                seen.add(place)
                ways.append((place, way + move))
    return ""
