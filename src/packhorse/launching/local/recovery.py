"""Runs a plan to its end: what fails and may succeed another time is started again from the newest sound checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from packhorse.errors import EXIT_BUG, EXIT_LOST, EXIT_MEMORY, EXIT_NOT_FINITE, EXIT_STOPPED
from packhorse.launching.local.launch import launch
from packhorse.launching.local.outcome import Outcome, newest_step
from packhorse.launching.local.stop_signals import StopSignals
from packhorse.launching.local.watch import end_orphans
from packhorse.plan.replan import replace_plan, with_smaller_micro
from packhorse.plan.run_plan import RunPlan
from packhorse.run_folder.attempts import AttemptRecord, read_attempts, record_killed_attempts
from packhorse.run_folder.folder import relative
from packhorse.run_folder.skipped_steps import read_skipped_steps

RETRY_EXIT_CODES = (EXIT_BUG, EXIT_LOST, EXIT_NOT_FINITE, EXIT_MEMORY)
"""Exit codes after which another attempt makes sense. Not a user's mistake, a full disk, or a stop on request."""


def run_to_end(plan: RunPlan, restarts: int, stop: StopSignals, say: Callable[[str], None]) -> Outcome:
    """Makes attempts until one ends well, or no other makes sense; called by the one that holds the run's lock.

    Args:
        plan: The run's.
        restarts: How many attempts may follow one that failed.
        stop: What is asked of the launcher.
        say: Shows a line: why the run starts again, or does not.

    Raises:
        UserError: The run is run by somebody else.
    """
    folder = Path(plan.run_folder)
    end_orphans(plan)
    record_killed_attempts(folder)
    used = 0
    while True:
        left_out = len(read_skipped_steps(folder))
        outcome = launch(plan, stop)
        if stop.asked:
            return outcome if outcome.again is None else replace(outcome, exit_code=EXIT_STOPPED)
        if outcome.again == "rewind" and len(read_skipped_steps(folder)) > left_out:
            say(_again(folder, outcome.headline))
            continue
        smaller = with_smaller_micro(plan) if outcome.again == "shrink" else None
        if smaller is not None:
            plan = smaller
            replace_plan(plan)
            say(_again(folder, outcome.headline, f", with {plan.chosen('batch.micro')}"))
            continue
        if outcome.exit_code not in RETRY_EXIT_CODES or used == restarts:
            return outcome
        if failed_alike(read_attempts(folder)):
            say("not started again: the attempt before failed at the same step with the same words")
            return outcome
        used += 1
        say(_again(folder, outcome.headline, f" (restart {used} of {restarts})"))


def _again(folder: Path, why: str, count: str = "") -> str:
    step = newest_step(folder)
    return f"{relative(folder)}: {why}; starting again from step {step}{count}"


def failed_alike(attempts: Sequence[AttemptRecord]) -> bool:
    """Whether the last two attempts failed alike, so that a third would too; a lost rank is no such failure."""
    if len(attempts) < 2 or attempts[-1].outcome == "lost":
        return False
    return _failure(attempts[-1]) == _failure(attempts[-2])


def _failure(attempt: AttemptRecord) -> tuple[str, str, int]:
    return attempt.outcome, attempt.message, attempt.last_step
