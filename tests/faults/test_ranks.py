"""A rank that is killed, hangs, fails or leaves ends the run soon, by name, with nothing left behind."""

from __future__ import annotations

import json
import re
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from cli import PACKHORSE, ROOM, environment, metrics, packhorse, processes_that_name
from packhorse.errors import EXIT_BUG, EXIT_LOST
from tiny import write_tiny

STEP = 12
HANG_SECONDS = 8


@dataclass(frozen=True)
class Case:
    """A fault, and what must be said of it; `seconds` from the fault to the end of `packhorse train`."""

    fault: str
    code: int
    seconds: float
    said: str


CASES = [
    Case(f"kill@{STEP}:1", EXIT_LOST, 5, rf"rank 1 was killed by SIGKILL in phase data of step {STEP + 1}, where"),
    Case(
        f"stop@{STEP}:1",
        EXIT_LOST,
        HANG_SECONDS + 10,
        rf"rank 1 hung \(stopped by a signal\) in phase data of step {STEP + 1}, where",
    ),
    Case(f"sleep@{STEP}:1", EXIT_LOST, HANG_SECONDS + 10, rf"rank 1 hung in phase data of step {STEP + 1}, where"),
    Case(f"raise@{STEP}:1", EXIT_BUG, 5, r"rank 1 failed.*RuntimeError: a fault was injected here"),
    Case(f"exit@{STEP}:0", EXIT_LOST, 5, rf"rank 0 ended without a message in phase data of step {STEP + 1}, where"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("ranks")
    write_tiny(
        place,
        steps=2000,
        parallel={"processes": 2},
        recovery={"hang_seconds": HANG_SECONDS},
        evaluation={"max_answered_rows": 0},
    )
    assert packhorse(place, "prepare", "tiny.yaml").code == 0
    return place


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.fault.split("@")[0])
def test_a_fault_of_one_rank_ends_the_run_by_name(case: Case, folder: Path) -> None:
    name = case.fault.split("@")[0]
    run = folder / "runs" / name
    words = [str(PACKHORSE), "train", "tiny.yaml", f"name={name}"]
    with subprocess.Popen(
        words, cwd=folder, env=environment(case.fault), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as child:
        _, said = child.communicate(timeout=300)
    ended = time.time()
    struck = (run / "metrics.jsonl").stat().st_mtime  # the last step was logged just before
    assert child.returncode == case.code, said
    assert ended - struck <= ROOM * case.seconds
    assert re.search(case.said, said, re.DOTALL), said
    assert metrics(run)[-1]["step"] == STEP
    assert processes_that_name(run) == []
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "failed"
    assert re.search(r"rank \d", status["message"])
    if case.code == EXIT_LOST:
        assert f"packhorse resume runs/{name}" in said
    if name == "stop":
        assert "in train" in (run / "logs" / "attempt-1" / "stacks-0.txt").read_text(), "where the other one waits"
        assert re.search(r"rank 0 in gloo:\w+, number \d+ of group ", said), said
    if name == "sleep":
        assert re.search(
            r'its Python stack.*sitecustomize.py", line \d+ in _strike.*loop.py", line \d+ in train', said, re.DOTALL
        )
