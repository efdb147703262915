"""Run a plan to its end: after a failure that need not repeat, start again from the newest sound checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

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

RETRY_EXIT_CODES: Final = (EXIT_BUG, EXIT_LOST, EXIT_NOT_FINITE, EXIT_MEMORY)
"""Exit codes after which another attempt may succeed. Not a user's mistake, a full disk, or a requested stop."""


def run_to_end(plan: RunPlan, restarts: int, stop: StopSignals, show: Callable[[str], None]) -> Outcome:
    """Make attempts until one succeeds or another one would not help. The caller holds the run's lock.

    Args:
        plan: Plan of the run.
        restarts: Number of attempts that may follow a failed one.
        stop: Requests to stop the launcher.
        show: Shows one line: why the run starts again, or does not.

    Raises:
        UserError: Another launch runs the run.
    """
    folder = Path(plan.run_folder)
    end_orphans(plan)
    record_killed_attempts(folder)
    used = 0
    while True:
        num_skipped = len(read_skipped_steps(folder))
        outcome = launch(plan, stop)
        if stop.requested:
            return outcome if outcome.again is None else replace(outcome, exit_code=EXIT_STOPPED)
        if outcome.again == "rewind" and len(read_skipped_steps(folder)) > num_skipped:
            show(_restart_line(folder, outcome.headline))
            continue
        smaller = with_smaller_micro(plan) if outcome.again == "shrink" else None
        if smaller is not None:
            plan = smaller
            replace_plan(plan)
            show(_restart_line(folder, outcome.headline, f", with {plan.chosen('batch.micro')}"))
            continue
        if outcome.exit_code not in RETRY_EXIT_CODES or used == restarts:
            return outcome
        if failed_alike(read_attempts(folder)):
            show("not started again: the previous attempt failed at the same step with the same message")
            return outcome
        used += 1
        show(_restart_line(folder, outcome.headline, f" (restart {used} of {restarts})"))


def failed_alike(attempts: Sequence[AttemptRecord]) -> bool:
    """Return whether the last two attempts failed in the same way, so that a third would too; not for a lost rank."""
    if len(attempts) < 2 or attempts[-1].outcome == "lost":
        return False
    last, previous = ((each.outcome, each.message, each.last_step) for each in (attempts[-1], attempts[-2]))
    return last == previous


def _restart_line(folder: Path, why: str, note: str = "") -> str:
    return f"{relative(folder)}: {why}; starting again from step {newest_step(folder)}{note}"
