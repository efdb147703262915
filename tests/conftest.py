"""What all tests share: no network, no trackers, no GPU, and a real shared folder that CI must have."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

import shared_folder

os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="disabled", TOKENIZERS_PARALLELISM="false")
# Threads that spin while they wait for each other take ten times as long on cores that other tests use too.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def pytest_configure(config: pytest.Config) -> None:
    """Hide the GPUs of this machine, except from `-m gpu`: the other tests are about the CPU path, everywhere alike."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture
def write_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function that puts a shell script in the place of nvidia-smi; CUDA hides none of the GPUs it lists."""
    folder = tmp_path / "nvidia"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def write(script: str) -> None:
        program = folder / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        program.chmod(0o755)

    return write


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
    "test_early_stopping.py",
    "test_preference_runs.py",
    "test_distillation.py",
    "test_evaluate_ranks.py",
    "test_sweeps.py",
    "test_gguf_export.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first: processes that share the files then end together. Else the order stays."""
    place = {name: number for number, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--write-golden", action="store_true", help="write golden texts anew; read the diff before you commit"
    )
