"""Soft CUDA for a session of tests: built once for each user, loaded in one process beside pytest's."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import soft_device

# Recipes, rows and golden curves are those of the parity tests.
sys.path.append(str(Path(__file__).parents[1] / "parity"))

from laboratory import Laboratory
from soft_runs import SoftCuda


@pytest.fixture(scope="session")
def laboratory(tmp_path_factory: pytest.TempPathFactory) -> Laboratory:
    return Laboratory(tmp_path_factory.mktemp("soft-cuda"))


@pytest.fixture(scope="session")
def cuda(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SoftCuda]:
    if soft_device.compiler() is None and os.environ.get("CI") != "true":
        pytest.skip("soft CUDA needs g++")
    with SoftCuda(tmp_path_factory.mktemp("soft-cuda-process") / "log.txt") as process:
        yield process
