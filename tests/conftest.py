"""What all tests share: no network, no trackers, and a real shared folder that CI must have."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import shared_folder

os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="disabled", TOKENIZERS_PARALLELISM="false")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real rows, tokenizers and a real small model beside the checkout."""
    return shared_folder.shared()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--write-golden", action="store_true", help="write golden texts anew; read the diff before you commit"
    )
