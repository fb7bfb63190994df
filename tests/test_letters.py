"""Axis letters: annotations, weights and einsums of the package use the table of docs/architecture.md alone."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import pytest

ROOT = Path(__file__).parents[1]
KINDS = {name for name in dir(jaxtyping) if name[0].isupper()} - {"Array", "ArrayLike", "PyTree"}
EINSUM = re.compile(r"[A-Za-z.]*(,[A-Za-z.]+)*->[A-Za-z.]*")
# The methods that declare a weight (models/parameters.py).
DECLARES = {"normal", "constant", "statistic"}
# Packages that still have axes of their own: to be emptied.
OTHERS = {"inference": {"R2"}, "data": {"m", "channels", "rows", "columns"}}


def table() -> set[str]:
    text = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.search(r"\| letters \| axes \|\n\|---\|---\|\n((?:\|.*\n)+)", text)[1]
    return {letter for row in rows.splitlines() for letter in re.findall(r"`(\w)`", row.split("|")[1])}


def axes(source: str) -> Iterator[tuple[int, str]]:
    """(line, axis) of every jaxtyping annotation, einsum and declared weight in a module's source."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id in KINDS:
            for part in ast.walk(node.slice):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield from ((node.lineno, axis) for axis in part.value.split())
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in DECLARES:
            if node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
                yield from ((node.lineno, axis) for axis in node.args[0].value.split())
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and EINSUM.fullmatch(node.value):
            yield from ((node.lineno, letter) for letter in node.value if letter.isalpha())


def strange(axis: str, letters: set[str]) -> bool:
    """Whether an axis is no letter of the table: numbers, `...`, `_`, `*batch` and computed sizes are none's letter."""
    axis = axis.lstrip("*#").partition("=")[0]
    if axis in ("...", "_", "batch", "") or axis.isdigit() or axis.startswith("{"):
        return False
    return any(name not in letters for name in re.findall(r"[A-Za-z_]\w*", axis))


@pytest.mark.parametrize("path", sorted((ROOT / "latent_jax").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_axes_are_letters_of_the_table(path: Path):
    known = table() | OTHERS.get(path.relative_to(ROOT / "latent_jax").parts[0], set())
    found = [f"line {line}: {axis}" for line, axis in axes(path.read_text()) if strange(axis, known)]
    assert not found, f"{path.relative_to(ROOT)}: not in docs/architecture.md's table of axis letters: {found}"


def test_a_letter_that_the_table_lacks_is_found():
    source = 'def f(x: Float[Array, "B y2"], z: Int[np.ndarray, " Y"] | None): return jnp.einsum("Bd,VD->BV", x, z)'
    assert sorted(axis for _, axis in axes(source) if strange(axis, table())) == ["Y", "d", "y2"]


def test_the_table_has_every_letter_once():
    text = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.search(r"\| letters \| axes \|\n\|---\|---\|\n((?:\|.*\n)+)", text)[1]
    letters = [letter for row in rows.splitlines() for letter in re.findall(r"`(\w)`", row.split("|")[1])]
    assert len(letters) == len(set(letters)) >= 20
