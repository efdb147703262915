"""One laboratory for all parity tests: rows are prepared, bases made and golden curves computed once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from laboratory import Laboratory


@pytest.fixture(scope="session")
def laboratory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laboratory]:
    threads = torch.get_num_threads()
    # Models this small are ten times slower where two threads wait for each other on busy cores.
    torch.set_num_threads(1)
    yield Laboratory(tmp_path_factory.mktemp("parity"))
    torch.set_num_threads(threads)
