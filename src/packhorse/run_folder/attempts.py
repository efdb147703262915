"""RUN/attempts.jsonl: one line per attempt (one launch of the run), with its steps and outcome.

The launcher appends the line when an attempt has ended. An attempt that was killed together with its launcher has no
line: its record is derived from its ranks' heartbeats, and the next launch appends it.

RUN/logs/attempt-N/rank-R.json says how a rank of the attempt ended; a rank that was killed leaves none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

from packhorse.durable import append_line, read_lines
from packhorse.errors import (
    EXIT_BUG,
    EXIT_DISK,
    EXIT_LOST,
    EXIT_MEMORY,
    EXIT_NOT_FINITE,
    EXIT_OK,
    EXIT_STOPPED,
    EXIT_USER_ERROR,
)
from packhorse.plan.run_plan import PlanPart
from packhorse.run_folder.heartbeat import read_heartbeats
from packhorse.run_folder.layout import ATTEMPTS_FILE, BEGAN_FILE, RANK_RECORDS, attempt_logs, attempt_numbers
from packhorse.secrets import mask

AttemptOutcome = Literal[
    "finished",
    "stopped",
    "killed",
    "lost",
    "failed",
    "refused",
    "not finite",
    "out of memory",
    "disk",
    "rewound",
    "shrunk",
]
OUTCOME_BY_EXIT_CODE: Final[dict[int, AttemptOutcome]] = {
    EXIT_OK: "finished",
    EXIT_STOPPED: "stopped",
    EXIT_LOST: "lost",
    EXIT_USER_ERROR: "refused",
    EXIT_NOT_FINITE: "not finite",
    EXIT_MEMORY: "out of memory",
    EXIT_DISK: "disk",
}
OUTCOME_BY_REQUEST: Final[dict[str, AttemptOutcome]] = {"rewind": "rewound", "shrink": "shrunk"}
CONSEQUENCE: Final = re.compile(r"[Cc]onnection|Broken pipe|ncclRemoteError|ncclSystemError|another rank failed")
"""What a rank reports in a collective when another rank is gone or has failed."""


class AttemptRecord(PlanPart):
    """One attempt; times in Unix seconds."""

    attempt: int
    started_at: float
    ended_at: float
    first_step: int
    """Optimizer steps done when the attempt began."""
    last_step: int
    """Optimizer steps done when the attempt ended."""
    outcome: AttemptOutcome
    message: str = ""


class AttemptStart(PlanPart):
    """What is known when an attempt begins."""

    started_at: float
    """Unix seconds."""
    from_step: int = 0
    """Step of the newest complete checkpoint; set by jobs only."""
    chain: str = ""
    """First of the jobs that continue each other; empty outside jobs."""


def outcome_of(exit_code: int, again: str | None) -> AttemptOutcome:
    """Return the outcome of an attempt from what its ranks request next (`rewind`, `shrink`), else its exit code."""
    return OUTCOME_BY_REQUEST[again] if again else OUTCOME_BY_EXIT_CODE.get(exit_code, "failed")


def write_attempt_start(logs: Path, start: AttemptStart) -> None:
    """Write what is known of an attempt that begins into its log folder."""
    (logs / BEGAN_FILE).write_text(start.model_dump_json() + "\n", encoding="utf-8")


def end_attempt(run_folder: Path, attempt: int, outcome: AttemptOutcome, message: str, now: float) -> None:
    """Append the line of an attempt that has ended, and wait until it is on disk."""
    logs = attempt_logs(run_folder, attempt)
    first, last = _first_and_last_step(logs)
    record = AttemptRecord(
        attempt=attempt,
        started_at=_started_at(logs),
        ended_at=now,
        first_step=first,
        last_step=last,
        outcome=outcome,
        message=mask(message),
    )
    append_line(run_folder / ATTEMPTS_FILE, record)


def read_attempts(run_folder: Path) -> list[AttemptRecord]:
    """Return all attempts in order; the record of one without a line is derived from its heartbeats."""
    records = {record.attempt: record for record in _written_records(run_folder)}
    for attempt in attempt_numbers(run_folder):
        if attempt not in records:
            records[attempt] = _record_from_heartbeats(attempt, attempt_logs(run_folder, attempt))
    return [records[attempt] for attempt in sorted(records)]


def has_ended(run_folder: Path, attempt: int) -> bool:
    """Return whether an attempt has its line; the last heartbeat of a rank may be later than that."""
    return any(record.attempt == attempt for record in _written_records(run_folder))


def record_killed_attempts(run_folder: Path) -> None:
    """Append the records of attempts that have no line. The caller holds the run's lock."""
    written = {record.attempt for record in _written_records(run_folder)}
    for record in read_attempts(run_folder):
        if record.attempt not in written:
            append_line(run_folder / ATTEMPTS_FILE, record)


def lost_steps(attempts: Sequence[AttemptRecord], good_step: int) -> int:
    """Return the number of steps whose work is lost: they were repeated, or have to be.

    Args:
        attempts: All attempts of a run, in order.
        good_step: Step from which the run would resume, or that it has reached.
    """
    made = [attempt for attempt in attempts if attempt.last_step > attempt.first_step]
    resumed_at = [attempt.first_step for attempt in made[1:]] + [good_step]
    return sum(max(0, attempt.last_step - step) for attempt, step in zip(made, resumed_at, strict=False))


def made_steps(attempts: Sequence[AttemptRecord]) -> int:
    """Return the number of steps that all attempts made, repeated ones included."""
    return sum(attempt.last_step - attempt.first_step for attempt in attempts)


def last_sign_of_life(run_folder: Path) -> float:
    """Return when the newest attempt began, or one of its ranks last beat; Unix seconds, 0 without attempts."""
    logs = _newest_logs(run_folder)
    if not logs.is_dir():
        return 0.0
    return max([_started_at(logs), *(beat.at for beat in read_heartbeats(logs) if beat.phase != "end")])


def newest_chain(run_folder: Path) -> str:
    """Return the first of the jobs that made the newest attempt; empty outside jobs."""
    start = _read_start(_newest_logs(run_folder))
    return start.chain if start is not None else ""


def count_attempts_without_progress(run_folder: Path, chain: str, newest_step: int) -> int:
    """Count the last attempts in a row that left no newer checkpoint than they began with.

    Args:
        run_folder: Folder of the run.
        chain: First of the jobs that continue each other; attempts of other jobs end the row.
        newest_step: Step of the newest checkpoint now.
    """
    count, step_after = 0, newest_step
    for attempt in reversed(attempt_numbers(run_folder)):
        start = _read_start(attempt_logs(run_folder, attempt))
        if start is None or start.chain != chain or step_after > start.from_step:
            break
        count, step_after = count + 1, start.from_step
    return count


def read_rank_records(logs: Path) -> list[dict[str, Any]]:
    """Return how the ranks of an attempt ended, the first one first."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in logs.glob(RANK_RECORDS)]
    return sorted(records, key=lambda record: record["time"])


def ended_early(record: Mapping[str, Any]) -> bool:
    """Return whether a rank failed, or stopped before the others: they may wait for it."""
    return record["exit_code"] not in (EXIT_OK, EXIT_STOPPED) or bool(record["message"])


def is_cause(record: Mapping[str, Any]) -> bool:
    """Return whether a rank reports its own failure, and not the consequence of another rank's end."""
    last = record["message"].strip().splitlines()[-1:]
    return record["exit_code"] != EXIT_BUG or not any(CONSEQUENCE.search(line) for line in last)


def _newest_logs(run_folder: Path) -> Path:
    return attempt_logs(run_folder, max(attempt_numbers(run_folder), default=0))


def _written_records(run_folder: Path) -> list[AttemptRecord]:
    return read_lines(run_folder / ATTEMPTS_FILE, AttemptRecord)


def _record_from_heartbeats(attempt: int, logs: Path) -> AttemptRecord:
    first, last = _first_and_last_step(logs)
    started = _started_at(logs)
    records = read_rank_records(logs)  # present if the ranks were started by hand
    how = next((record for record in records if ended_early(record)), records[0] if records else None)
    return AttemptRecord(
        attempt=attempt,
        started_at=started,
        ended_at=max((beat.at for beat in read_heartbeats(logs)), default=started),
        first_step=first,
        last_step=last,
        outcome=outcome_of(how["exit_code"], how.get("again")) if how else "killed",
        message=how["message"] if how else "ended together with its launcher",
    )


def _first_and_last_step(logs: Path) -> tuple[int, int]:
    """Return the optimizer steps done when an attempt began and when it ended, from its ranks' heartbeats."""
    beats = read_heartbeats(logs)
    first = max((beat.first_step or 0 for beat in beats), default=0)
    return first, max((beat.step for beat in beats), default=0)


def _read_start(logs: Path) -> AttemptStart | None:
    try:
        return AttemptStart.model_validate_json((logs / BEGAN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _started_at(logs: Path) -> float:
    start = _read_start(logs)
    return logs.stat().st_mtime if start is None else start.started_at
