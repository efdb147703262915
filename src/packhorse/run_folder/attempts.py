"""attempts.jsonl: a line for each attempt to run a plan, and what became of the steps that were made more than once.

The launcher appends a line when an attempt has ended. One that was killed together with its launcher has none: it is
told from its ranks' heartbeats, and the next launch writes it down.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from packhorse.durable import append_line, read_lines
from packhorse.errors import (
    EXIT_DISK,
    EXIT_LOST,
    EXIT_MEMORY,
    EXIT_NOT_FINITE,
    EXIT_OK,
    EXIT_STOPPED,
    EXIT_USER_ERROR,
)
from packhorse.plan.run_plan import PlanPart
from packhorse.run_folder.attempts import ended_early, read_rank_records
from packhorse.run_folder.heartbeat import read_heartbeats
from packhorse.secrets import mask

ATTEMPTS_FILE = "attempts.jsonl"
BEGAN_FILE = "began.json"

Ended = Literal[
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
BY_CODE: dict[int, Ended] = {
    EXIT_OK: "finished",
    EXIT_STOPPED: "stopped",
    EXIT_LOST: "lost",
    EXIT_USER_ERROR: "refused",
    EXIT_NOT_FINITE: "not finite",
    EXIT_MEMORY: "out of memory",
    EXIT_DISK: "disk",
}
BY_REQUEST: dict[str, Ended] = {"rewind": "rewound", "shrink": "shrunk"}


class AttemptRecord(PlanPart):
    """One attempt; times in Unix seconds."""

    attempt: int
    started_at: float
    ended_at: float
    first_step: int
    """Optimizer steps done when it began."""
    last_step: int
    """And when it ended."""
    outcome: Ended
    message: str = ""


class AttemptStart(PlanPart):
    """What is known when an attempt begins."""

    started_at: float
    """Unix seconds."""
    from_step: int = 0
    """Step of the newest complete checkpoint; told by jobs only."""
    chain: str = ""
    """The first of the jobs that go on with each other; empty where no job runs it."""


def outcome_of(exit_code: int, again: str | None) -> Ended:
    """The word for how an attempt ended: by what its ranks ask for, else by its exit code."""
    return BY_REQUEST[again] if again else BY_CODE.get(exit_code, "failed")


def write_attempt_start(logs: Path, begun: AttemptStart) -> None:
    """Writes what is known of an attempt that begins into its log folder."""
    (logs / BEGAN_FILE).write_text(begun.model_dump_json() + "\n", encoding="utf-8")


def steps_of(logs: Path) -> tuple[int, int]:
    """Optimizer steps done when an attempt began and when it ended, as its ranks' heartbeats say."""
    beats = read_heartbeats(logs)
    first = max((beat.first_step or 0 for beat in beats), default=0)
    return first, max((beat.step for beat in beats), default=0)


def end_attempt(run_folder: Path, attempt: int, outcome: Ended, message: str, now: float) -> None:
    """Appends the line of an attempt that has ended, and waits until it is on disk."""
    logs = _logs(run_folder, attempt)
    first, last = steps_of(logs)
    record = AttemptRecord(
        attempt=attempt,
        started_at=_started_at(logs),
        ended_at=now,
        first_step=first,
        last_step=last,
        outcome=outcome,
        message=mask(message),
    )
    _append(run_folder, record)


def read_attempts(run_folder: Path) -> list[AttemptRecord]:
    """All attempts in order; those without a line as far as their heartbeats tell."""
    written = {record.attempt: record for record in _lines(run_folder)}
    untold = [number for number in _numbers(run_folder) if number not in written]
    told = {number: _from_heartbeats(number, _logs(run_folder, number)) for number in untold}
    both = written | told
    return [both[number] for number in sorted(both)]


def has_ended(run_folder: Path, attempt: int) -> bool:
    """Whether somebody wrote down how an attempt ended; the last heartbeat of a rank may be younger than that."""
    return any(record.attempt == attempt for record in _lines(run_folder))


def record_killed_attempts(run_folder: Path) -> None:
    """Writes down the attempts that have no line; called by the one that holds the run's lock."""
    written = {record.attempt for record in _lines(run_folder)}
    for record in read_attempts(run_folder):
        if record.attempt not in written:
            _append(run_folder, record)


def lost_steps(attempts: Sequence[AttemptRecord], good_step: int) -> int:
    """Steps that were made and had to be made again, or have to be.

    Args:
        attempts: All of a run, in order.
        good_step: Where the run stands: the step that it would go on from, or has reached.
    """
    made = [attempt for attempt in attempts if attempt.last_step > attempt.first_step]
    began = [attempt.first_step for attempt in made[1:]] + [good_step]
    return sum(max(0, attempt.last_step - goes_on) for attempt, goes_on in zip(made, began, strict=False))


def made_steps(attempts: Sequence[AttemptRecord]) -> int:
    """Steps that were made, each as often as it was."""
    return sum(attempt.last_step - attempt.first_step for attempt in attempts)


def last_sign_of_life(run_folder: Path) -> float:
    """When the newest attempt began, or one of its ranks last said that it lives; Unix seconds, 0 without attempts."""
    logs = _logs(run_folder, max(_numbers(run_folder), default=0))
    if not logs.is_dir():
        return 0.0
    return max([_started_at(logs), *(beat.at for beat in read_heartbeats(logs) if beat.phase != "end")])


def chain_of_newest_attempt(run_folder: Path) -> str:
    """The first of the jobs that made the newest attempt; empty where no job did."""
    begun = _begun(_logs(run_folder, max(_numbers(run_folder), default=0)))
    return begun.chain if begun is not None else ""


def count_attempts_without_progress(run_folder: Path, chain: str, newest_step: int) -> int:
    """How many of the last attempts in a row, all of these jobs, have left no newer checkpoint than there was.

    Args:
        run_folder: The run's.
        chain: The first of the jobs.
        newest_step: Of the checkpoint that stands now.
    """
    count, after = 0, newest_step
    for attempt in sorted(_numbers(run_folder), reverse=True):
        begun = _begun(_logs(run_folder, attempt))
        if begun is None or begun.chain != chain or after > begun.from_step:
            break
        count, after = count + 1, begun.from_step
    return count


def _numbers(run_folder: Path) -> list[int]:
    return [int(path.name.removeprefix("attempt-")) for path in (run_folder / "logs").glob("attempt-*")]


def _logs(run_folder: Path, attempt: int) -> Path:
    return run_folder / "logs" / f"attempt-{attempt}"


def _append(run_folder: Path, record: AttemptRecord) -> None:
    append_line(run_folder / ATTEMPTS_FILE, record)


def _lines(run_folder: Path) -> list[AttemptRecord]:
    return read_lines(run_folder / ATTEMPTS_FILE, AttemptRecord)


def _from_heartbeats(attempt: int, logs: Path) -> AttemptRecord:
    first, last = steps_of(logs)
    started = _started_at(logs)
    records = read_rank_records(logs)  # of a launch that no launcher of ours watched
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


def _begun(logs: Path) -> AttemptStart | None:
    try:
        return AttemptStart.model_validate_json((logs / BEGAN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _started_at(logs: Path) -> float:
    begun = _begun(logs)
    return logs.stat().st_mtime if begun is None else begun.started_at
