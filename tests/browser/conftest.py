"""The browser that opens pages; under CI it must be there."""

from __future__ import annotations

import shutil

import pytest

from missing_parts import missing

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="session")
def browser() -> str:
    """Path of the browser."""
    found = next((path for path in map(shutil.which, NAMES) if path), None)
    if found is None:
        missing(f"none of {', '.join(NAMES)} is there: install Chromium to open the page in it")
    return found
