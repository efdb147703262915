"""How an attempt ended, from what its ranks left: exit codes do not survive the agent between them and us."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from packhorse.errors import EXIT_BUG, EXIT_LOST, EXIT_OK, EXIT_STOPPED
from packhorse.launching.local.failure_logs import ProcessFailure, find_failure, last_lines, memory_limit_note
from packhorse.launching.local.hang_report import read_collectives, read_stack
from packhorse.launching.local.watch import ForcedEnd
from packhorse.plan.run_plan import RunPlan
from packhorse.run_folder.attempts import ended_early, is_cause, read_rank_records
from packhorse.run_folder.checkpoints.listing import newest_complete, step_of
from packhorse.run_folder.folder import relative
from packhorse.run_folder.heartbeat import Heartbeat
from packhorse.run_folder.layout import CHECKPOINTS_FOLDER, STDERR_LOG, rank_log_name
from packhorse.run_folder.status import State, Status, read_status, write_status

LAST_LINES = 12
NUMBERED = {"data", "forward", "backward", "optimizer"}
"""Phases of a step that is not done yet."""
STATES = {"T": "stopped by a signal", "t": "stopped by a debugger", "D": "waiting for a disk or a network file system"}
"""What the kernel says of a process that hangs, in words (proc(5))."""


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended.

    Attributes:
        exit_code: One of those in `errors`.
        message: What to show; empty if all is well.
        headline: The same in one line.
        again: Why the ranks ask for another attempt: `rewind`, `shrink`; None where they do not.
    """

    exit_code: int
    message: str = ""
    headline: str = ""
    again: str | None = None


def judge(plan: RunPlan, logs: Path, attempt: int, ending: ForcedEnd | None, ended_with: int | None = None) -> Outcome:
    """Reads what the ranks left.

    Args:
        plan: The run's.
        logs: The attempt's log folder; none of its ranks lives any more.
        attempt: Its number.
        ending: Why it was ended from outside, if it was.
        ended_with: Exit code of `accelerate launch`, as in `subprocess`; None where it did not end by itself.
    """
    records = read_rank_records(logs)
    if ending is not None and ending.kind in ("dead", "hung"):
        return _lost(plan, logs, attempt, ending)
    left = [record for record in records if ended_early(record)]
    if left:
        return _left(plan, logs, attempt, next(filter(is_cause, left), left[0]))
    again = next((record["again"] for record in records if record.get("again")), None)
    if again is not None:
        return Outcome(EXIT_STOPPED, headline=again, again=again)
    return _as_told(plan, logs, attempt, ended_with)


def _as_told(plan: RunPlan, logs: Path, attempt: int, ended_with: int | None) -> Outcome:
    """No rank failed: rank 0 has said how it ended, or none has begun."""
    folder = Path(plan.run_folder)
    status = read_status(folder)
    told = status.state if status is not None and status.attempt == attempt else None
    if told == "finished":
        return Outcome(EXIT_OK)
    if status is not None and told == "stopped":
        return Outcome(EXIT_STOPPED, f"stopped; {_go_on(folder, status.step, status.num_steps)}", "stopped")
    killed = ProcessFailure(None, ended_with) if ended_with is not None and ended_with < 0 else None
    headline = f"accelerate launch {killed.cause}" if killed else "the ranks ended without a word"
    headline += memory_limit_note(logs)
    _tell(plan, attempt, "failed", headline)
    message = _with_lines(headline, last_lines(logs / STDERR_LOG, LAST_LINES), logs)
    return Outcome(EXIT_LOST if killed else EXIT_BUG, message, headline)


def stopped(plan: RunPlan, attempt: int, headline: str) -> Outcome:
    """A stop that the ranks could not save for; the newest checkpoint, or the start, is gone on from."""
    _tell(plan, attempt, "stopped", headline)
    step = newest_step(Path(plan.run_folder))
    return Outcome(EXIT_STOPPED, f"{headline}; {_go_on(Path(plan.run_folder), step, plan.num_steps or 0)}", headline)


def newest_step(run_folder: Path) -> int:
    """Step of the newest complete checkpoint; 0 where there is none."""
    newest = newest_complete(run_folder / CHECKPOINTS_FOLDER)
    return step_of(newest) if newest else 0


def _left(plan: RunPlan, logs: Path, attempt: int, record: dict[str, Any]) -> Outcome:
    if record["exit_code"] == EXIT_STOPPED:
        told = stopped(plan, attempt, record["message"].splitlines()[0])
        return replace(told, again=record.get("again"))
    return _failed(plan, logs, attempt, record)


def _failed(plan: RunPlan, logs: Path, attempt: int, record: dict[str, Any]) -> Outcome:
    lines = record["message"].strip().splitlines()
    code, again = record["exit_code"], record.get("again")
    if code != EXIT_BUG:
        _tell(plan, attempt, "failed", lines[0])
        return Outcome(code, "\n".join(lines), lines[0], again)
    headline = f"rank {record['rank']} failed: {lines[-1]}"
    _tell(plan, attempt, "failed", headline)
    return Outcome(code, _with_lines(f"rank {record['rank']} failed", lines, logs), headline, again)


def _lost(plan: RunPlan, logs: Path, attempt: int, ending: ForcedEnd) -> Outcome:
    beat = ending.heartbeat
    headline = f"rank {beat.rank} {_cause(logs, ending)} in {where(beat)}{memory_limit_note(logs)}"
    _tell(plan, attempt, "failed", headline)
    own_log = logs / rank_log_name(beat.rank)
    lines = [f"{headline}, where it had been since {time.strftime('%H:%M:%S', time.localtime(beat.since))}."]
    if stack := read_stack(logs, beat.rank):
        lines += ["  it stood at (innermost first):", *(f"    {line}" for line in stack)]
    if said := last_lines(own_log, LAST_LINES):
        lines += [f"  its last lines ({relative(own_log)}):", *(f"    {line}" for line in said)]
    if waiting := read_collectives(logs):
        lines += ["  collectives that ranks wait in:", *(f"    {line}" for line in waiting)]
    lines += [f"  Python stacks of the ranks that could still write them: {relative(logs)}/stacks-*.txt"]
    folder = Path(plan.run_folder)
    lines += ["  " + _go_on(folder, newest_step(folder), plan.num_steps or 0)]
    return Outcome(EXIT_LOST, "\n".join(lines), headline)


def where(beat: Heartbeat) -> str:
    """A rank's phase and step, in words."""
    if beat.phase == "start":
        return "its start"
    if beat.phase in NUMBERED:
        return f"phase {beat.phase} of step {beat.step + 1}"
    return f"phase {beat.phase} at step {beat.step}"


def _cause(logs: Path, ending: ForcedEnd) -> str:
    beat = ending.heartbeat
    if ending.kind == "dead":
        failure = find_failure(logs, beat.pid)
        return failure.cause if failure else "ended without a word"
    return f"hung ({STATES[ending.state]})" if ending.state in STATES else "hung"


def _go_on(folder: Path, step: int, num_steps: int) -> str:
    return f"it goes on from step {step} of {num_steps} with: packhorse resume {relative(folder)}"


def _with_lines(head: str, lines: Sequence[str], logs: Path) -> str:
    shown = ("  " + line for line in lines[-LAST_LINES:])
    return "\n".join([f"{head}; its last lines (all of it in {relative(logs)}):", *shown])


def _tell(plan: RunPlan, attempt: int, state: State, message: str) -> None:
    folder = Path(plan.run_folder)
    step = newest_step(folder)
    write_status(
        folder, Status(state=state, step=step, num_steps=plan.num_steps or 0, attempt=attempt, message=message)
    )
