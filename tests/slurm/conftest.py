"""One cluster of two nodes for all tests that need no other, and a run on it that nothing happens to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, running_cluster
from interrupted import EVALUATE_EVERY, SAVE_EVERY, STEPS, planned

from packhorse.run_folder.attempts import read_attempts
from tiny import write_tiny


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    with running_cluster() as started:
        yield started


@pytest.fixture(scope="session")
def slurm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all nodes see, with a recipe that saves and evaluates often."""
    place = tmp_path_factory.mktemp("slurm")
    write_tiny(
        place,
        steps=STEPS,
        # Few rows: an evaluation each two steps takes a moment.
        data={"sources": [{"path": "builtin:core.messages.jsonl", "rows": 160}]},
        batch={"length": 256, "packs": 2},
        checkpoint={"every_steps": SAVE_EVERY, "asynchronous": False},
        evaluation={"every_steps": EVALUATE_EVERY, "max_answered_rows": 0},
    )
    return place


@pytest.fixture(scope="session")
def unbroken(cluster: Cluster, slurm_folder: Path) -> Path:
    """A process on each of two nodes, from the first step to the last."""
    run = planned(slurm_folder, "unbroken", "parallel.processes=2")
    job = cluster.submit(run, "--nodes=2")
    assert cluster.wait(job, 900) == "COMPLETED", cluster.told(job)
    assert len(read_attempts(run)) == 1
    return run
