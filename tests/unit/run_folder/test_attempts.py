"""One line per attempt, also for one that was killed together with its launcher; and the steps that were lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from packhorse.errors import EXIT_BUG, EXIT_OK
from packhorse.run_folder.attempts import (
    AttemptRecord,
    AttemptStart,
    end_attempt,
    lost_steps,
    made_steps,
    read_attempts,
    record_killed_attempts,
    write_attempt_start,
)
from packhorse.run_folder.layout import ATTEMPTS_FILE


def attempt(number: int, first: int, last: int) -> AttemptRecord:
    return AttemptRecord(
        attempt=number, started_at=0, ended_at=1, first_step=first, last_step=last, outcome="lost", message=""
    )


def logs_of(run: Path, number: int, first: int | None = None, step: int = 0, at: float = 0) -> Path:
    logs = run / "logs" / f"attempt-{number}"
    logs.mkdir(parents=True)
    write_attempt_start(logs, AttemptStart(started_at=100.0 * number))
    beat = {"rank": 0, "pid": 1, "host": "h", "phase": "data", "step": step, "since": at, "at": at, "first_step": first}
    (logs / "heartbeat-0.json").write_text(json.dumps(beat))
    return logs


def test_an_attempt_killed_with_its_launcher_is_derived_from_heartbeats_and_then_written(tmp_path: Path) -> None:
    logs_of(tmp_path, 1, first=0, step=30, at=150.0)
    end_attempt(tmp_path, 1, "lost", "rank 1 was killed", 160.0)
    logs_of(tmp_path, 2, first=25, step=41, at=290.0)
    attempts = read_attempts(tmp_path)
    assert [(each.outcome, each.first_step, each.last_step) for each in attempts] == [
        ("lost", 0, 30),
        ("killed", 25, 41),
    ]
    assert (attempts[1].started_at, attempts[1].ended_at) == (200.0, 290.0)
    record_killed_attempts(tmp_path)
    record_killed_attempts(tmp_path)
    assert len((tmp_path / ATTEMPTS_FILE).read_text().splitlines()) == 2
    assert read_attempts(tmp_path) == attempts


@pytest.mark.parametrize(("code", "message", "outcome"), [(EXIT_OK, "", "finished"), (EXIT_BUG, "bug", "failed")])
def test_an_attempt_started_by_hand_is_derived_from_its_ranks_records(
    tmp_path: Path, code: int, message: str, outcome: str
) -> None:
    logs = logs_of(tmp_path, 1, first=0, step=40)
    (logs / "rank-0.json").write_text(json.dumps({"rank": 0, "time": 1, "exit_code": code, "message": message}))
    assert read_attempts(tmp_path)[0].outcome == outcome


def test_a_torn_line_does_not_affect_others(tmp_path: Path) -> None:
    logs_of(tmp_path, 1, first=0, step=30)
    (tmp_path / ATTEMPTS_FILE).write_text('{"attempt": 1, "started')
    logs_of(tmp_path, 2, first=0, step=7)
    end_attempt(tmp_path, 2, "stopped", "", 1.0)
    assert [each.outcome for each in read_attempts(tmp_path)] == ["killed", "stopped"]


def test_lost_steps_are_those_that_were_made_and_not_resumed_from() -> None:
    attempts = [attempt(1, 0, 37), attempt(2, 30, 44), attempt(3, 0, 0), attempt(4, 40, 52)]
    assert lost_steps(attempts, 50) == 7 + 4 + 2
    assert made_steps(attempts) == 37 + 14 + 12
    assert lost_steps(attempts, 52) == 7 + 4, "while it runs, or has finished, nothing of the last one is lost"
    assert lost_steps([], 0) == 0
