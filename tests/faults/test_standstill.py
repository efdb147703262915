"""A run that no launcher watches, as in a job: its ranks end it themselves when one of them stands still."""

from __future__ import annotations

import json
from pathlib import Path

from cli import ROOM
from packhorse.errors import EXIT_LOST
from packhorse.launching.local.hang_report import read_collectives, read_stack
from ranks import planned, run_ranks
from tiny import write_tiny


def test_a_rank_that_sleeps_for_ever_is_named_by_the_one_that_waits_for_it(tmp_path: Path) -> None:
    recipe = write_tiny(tmp_path, recovery={"hang_seconds": round(4 * ROOM)}, evaluation={"max_answered_rows": 0})
    run = planned(recipe, "asleep", "parallel.processes=2")
    records = run_ranks(run, fault="sleep@3:1")
    logs = run / "logs" / "attempt-1"
    assert {record["exit_code"] for record in records} == {EXIT_LOST}
    assert {record["hung"] for record in records} == {1}
    assert "hung in phase data" in records[0]["message"]
    assert any("sitecustomize.py" in line for line in read_stack(logs, 1))
    assert next(line.split(",")[0] for line in read_collectives(logs)).startswith("rank 0 in gloo:")
    assert json.loads((logs / "heartbeat-1.json").read_text())["step"] == 3
