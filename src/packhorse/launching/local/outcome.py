"""Determine how an attempt ended, from what its ranks left: their exit codes do not reach the launcher."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from packhorse.errors import EXIT_BUG, EXIT_LOST, EXIT_OK, EXIT_STOPPED
from packhorse.launching.local.failure_logs import ProcessFailure, find_failure, last_lines, memory_limit_note
from packhorse.launching.local.hang_report import read_collectives, read_stack
from packhorse.launching.local.watch import ForcedEnd
from packhorse.plan.run_plan import RunPlan
from packhorse.run_folder.attempts import ended_early, is_cause, read_rank_records
from packhorse.run_folder.checkpoints.listing import newest_complete, step_of
from packhorse.run_folder.folder import relative
from packhorse.run_folder.heartbeat import Heartbeat
from packhorse.run_folder.layout import CHECKPOINTS_FOLDER, RANK_LOGS, STACKS, STDERR_LOG, numbered
from packhorse.run_folder.status import State, Status, read_status, write_status

LAST_LINES: Final = 12
UNFINISHED_STEP_PHASES: Final = {"data", "forward", "backward", "optimizer"}
PROCESS_STATES: Final = {
    "T": "stopped by a signal",
    "t": "stopped by a debugger",
    "D": "waiting for a disk or a network file system",
}
"""States of a process that hangs (proc(5))."""


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended.

    Attributes:
        exit_code: One of those in `errors`.
        message: Text to show; after success, why the run ended before its last step, else empty.
        headline: Summary of the message in one line.
        again: Why the ranks request another attempt: `rewind`, `shrink`; None if they do not.
    """

    exit_code: int
    message: str = ""
    headline: str = ""
    again: str | None = None


def determine_outcome(
    plan: RunPlan, logs: Path, attempt: int, forced_end: ForcedEnd | None, ended_with: int | None = None
) -> Outcome:
    """Determine the outcome of an attempt and write a failure into the run's status.

    Args:
        plan: Plan of the run.
        logs: Log folder of the attempt; none of its ranks lives any more.
        attempt: Number of the attempt.
        forced_end: Why the attempt was ended from outside, if it was.
        ended_with: Exit code of `accelerate launch`, as in `subprocess`; None if it was ended from outside.
    """
    if forced_end is not None and forced_end.kind in ("dead", "hung"):
        return _lost_outcome(plan, logs, attempt, forced_end)
    records = read_rank_records(logs)
    early = [record for record in records if ended_early(record)]
    if early:
        first = next(filter(is_cause, early), early[0])
        if first["exit_code"] == EXIT_STOPPED:
            stopped = stopped_outcome(plan, attempt, first["message"].splitlines()[0])
            return replace(stopped, again=first.get("again"))
        return _failed_outcome(plan, logs, attempt, first)
    again = next((record["again"] for record in records if record.get("again")), None)
    if again is not None:
        return Outcome(EXIT_STOPPED, headline=again, again=again)
    return _outcome_without_failure(plan, logs, attempt, ended_with)


def stopped_outcome(plan: RunPlan, attempt: int, headline: str) -> Outcome:
    """Return the outcome of a stop before the ranks could save: the run resumes from its newest checkpoint."""
    _write_status(plan, attempt, "stopped", headline)
    folder = Path(plan.run_folder)
    message = f"{headline}; {_resume_hint(folder, newest_step(folder), plan.num_steps or 0)}"
    return Outcome(EXIT_STOPPED, message, headline)


def newest_step(run_folder: Path) -> int:
    """Return the step of the newest complete checkpoint; 0 if there is none."""
    newest = newest_complete(run_folder / CHECKPOINTS_FOLDER)
    return step_of(newest) if newest else 0


def describe_phase(beat: Heartbeat) -> str:
    """Return a rank's phase and step as text."""
    if beat.phase == "start":
        return "its start"
    if beat.phase in UNFINISHED_STEP_PHASES:
        return f"phase {beat.phase} of step {beat.step + 1}"
    return f"phase {beat.phase} at step {beat.step}"


def _outcome_without_failure(plan: RunPlan, logs: Path, attempt: int, ended_with: int | None) -> Outcome:
    """Return the outcome that rank 0 wrote into the status, or that of an attempt whose ranks never began."""
    folder = Path(plan.run_folder)
    status = read_status(folder)
    state = status.state if status is not None and status.attempt == attempt else None
    if status is not None and state == "finished":
        return Outcome(EXIT_OK, status.message, status.message)
    if status is not None and state == "stopped":
        return Outcome(EXIT_STOPPED, f"stopped; {_resume_hint(folder, status.step, status.num_steps)}", "stopped")
    killed = ProcessFailure(None, ended_with) if ended_with is not None and ended_with < 0 else None
    headline = f"accelerate launch {killed.cause}" if killed else "the ranks ended without a message"
    headline += memory_limit_note(logs)
    _write_status(plan, attempt, "failed", headline)
    message = _with_last_lines(headline, last_lines(logs / STDERR_LOG, LAST_LINES), logs)
    return Outcome(EXIT_LOST if killed else EXIT_BUG, message, headline)


def _failed_outcome(plan: RunPlan, logs: Path, attempt: int, record: dict[str, Any]) -> Outcome:
    lines = record["message"].strip().splitlines()
    code, again = record["exit_code"], record.get("again")
    if code != EXIT_BUG:
        _write_status(plan, attempt, "failed", lines[0])
        return Outcome(code, "\n".join(lines), lines[0], again)
    headline = f"rank {record['rank']} failed: {lines[-1]}"
    _write_status(plan, attempt, "failed", headline)
    return Outcome(code, _with_last_lines(f"rank {record['rank']} failed", lines, logs), headline, again)


def _lost_outcome(plan: RunPlan, logs: Path, attempt: int, forced_end: ForcedEnd) -> Outcome:
    beat = forced_end.heartbeat
    headline = f"rank {beat.rank} {_cause(logs, forced_end)} in {describe_phase(beat)}{memory_limit_note(logs)}"
    _write_status(plan, attempt, "failed", headline)
    log = logs / numbered(RANK_LOGS, beat.rank)
    lines = [f"{headline}, where it had been since {time.strftime('%H:%M:%S', time.localtime(beat.since))}."]
    if stack := read_stack(logs, beat.rank):
        lines += ["  its Python stack (innermost frame first):", *(f"    {line}" for line in stack)]
    if last := last_lines(log, LAST_LINES):
        lines += [f"  its last lines ({relative(log)}):", *(f"    {line}" for line in last)]
    if waiting := read_collectives(logs):
        lines += ["  collectives that ranks wait in:", *(f"    {line}" for line in waiting)]
    lines += [f"  Python stacks of the ranks that could still write them: {relative(logs)}/{STACKS}"]
    folder = Path(plan.run_folder)
    lines += ["  " + _resume_hint(folder, newest_step(folder), plan.num_steps or 0)]
    return Outcome(EXIT_LOST, "\n".join(lines), headline)


def _cause(logs: Path, forced_end: ForcedEnd) -> str:
    if forced_end.kind == "dead":
        failure = find_failure(logs, forced_end.heartbeat.pid)
        return failure.cause if failure else "ended without a message"
    return f"hung ({PROCESS_STATES[forced_end.state]})" if forced_end.state in PROCESS_STATES else "hung"


def _resume_hint(folder: Path, step: int, num_steps: int) -> str:
    return f"resume from step {step} of {num_steps} with: packhorse resume {relative(folder)}"


def _with_last_lines(head: str, lines: Sequence[str], logs: Path) -> str:
    shown = ("  " + line for line in lines[-LAST_LINES:])
    return "\n".join([f"{head}; its last lines (all of it in {relative(logs)}):", *shown])


def _write_status(plan: RunPlan, attempt: int, state: State, message: str) -> None:
    folder = Path(plan.run_folder)
    step = newest_step(folder)
    write_status(
        folder, Status(state=state, step=step, num_steps=plan.num_steps or 0, attempt=attempt, message=message)
    )
