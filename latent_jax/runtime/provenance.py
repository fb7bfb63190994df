"""Where a run's code came from: package versions and the git commit."""

import importlib.metadata
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path

_PACKAGES = ("latent_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "numpy")


def versions() -> dict[str, str]:
    """Version of Python and of every package that numbers depend on; what is not installed is left out."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """The commit that this package runs from, '+' appended if tracked files were changed; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    # Installed into an environment that lies in somebody's repository, that repository's commit says nothing about us.
    if not (root / ".git").exists():
        return None
    commit, changed = _git(root, "rev-parse", "HEAD"), _git(root, "status", "--porcelain", "--untracked-files=no")
    return None if commit is None else commit + ("+" if changed else "")


def _git(root: Path, *arguments: str) -> str | None:
    try:
        # Else `status` writes its index anew, and a kill or a full disk leaves a lock in the user's repository.
        command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return ended.stdout.strip() if ended.returncode == 0 else None


def changes(found: Mapping) -> list[str]:
    """A line for each package, and the commit, that is another than in a run's config.json."""
    then, now = found.get("versions") or {}, versions()
    lines = [f"{name} {then[name]} -> {now.get(name, 'none')}" for name in then if then[name] != now.get(name)]
    began, runs = found.get("git_commit"), git_commit()
    if began is not None and runs is not None and began != runs:
        short = [commit[:12] + "+" * commit.endswith("+") for commit in (began, runs)]
        lines.append(f"commit {short[0]} -> {short[1]}")
    return [f"not as this run began: {', '.join(lines)}; numbers may differ by rounding, or more"] if lines else []
