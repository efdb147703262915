"""Real rows, tokenizers and a small real model, in a folder beside the checkout that CI must have."""

from __future__ import annotations

from pathlib import Path

from missing_parts import missing

FOLDER = Path(__file__).resolve().parents[2] / "shared"


def shared(name: str = "") -> Path:
    """A file or folder of it; skips the test in a user's clone, where it is absent."""
    path = FOLDER / name
    if not path.exists():
        missing(f"{path} is absent: real rows and models are not part of a clone")
    return path
