"""What all tests share: no network, no trackers, and a real shared folder that CI must have."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import shared_folder

os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="disabled", TOKENIZERS_PARALLELISM="false")
# Threads that spin while they wait for each other take ten times as long on cores that other tests use too.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real rows, tokenizers and a real small model beside the checkout."""
    return shared_folder.shared()


# Minutes of work each, longest first; all other files take less.
LONG_FILES = (
    "test_matrix.py",
    "test_quickstart.py",
    "test_runs.py",
    "test_smoke.py",
    "test_numbers.py",
    "test_ranks.py",
    "test_families.py",
    "test_other_engines.py",
    "test_fake_ranks.py",
    "test_measured_memory.py",
    "test_train_rehearse.py",
    "test_restarts.py",
    "test_kills.py",
    "test_signals.py",
    "test_engines.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first: processes that share the files then end together. Else the order stays."""
    place = {name: number for number, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--write-golden", action="store_true", help="write golden texts anew; read the diff before you commit"
    )
