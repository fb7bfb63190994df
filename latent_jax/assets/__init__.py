"""Files that ship with the package."""

from pathlib import Path

TINY_VL = Path(__file__).parent / "tiny_vl"
