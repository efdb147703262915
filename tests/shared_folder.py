"""Real rows, tokenizers and a small real model, in a folder beside the checkout that CI must have."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "shared"


def shared(name: str = "") -> Path:
    """A file or folder of it; skips the test in a user's clone, where it is absent."""
    path = FOLDER / name
    if not path.exists():
        if os.environ.get("CI") == "true":
            pytest.fail(f"{path} is absent; under CI real data must be there")
        pytest.skip(f"{path} is absent: real rows and models are not part of a clone")
    return path
