"""Run the processes that measure the models of a run with `accelerate launch`, and explain what failed."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any, Final

from packhorse.errors import EXIT_LOST, UserError
from packhorse.launching.local.environment import extensions_folder, remove_abandoned_locks
from packhorse.launching.local.failure_logs import last_lines
from packhorse.launching.local.launch import launch_variables, local_argv
from packhorse.launching.local.watch import end_processes
from packhorse.plan.run_plan import RunPlan
from packhorse.run_folder.folder import relative
from packhorse.run_folder.layout import FAILURES, STDERR_LOG

LAST_LINES: Final = 12


def launch_evaluation(plan: RunPlan, folder: Path) -> None:
    """Run the processes of an evaluation to their end.

    Args:
        plan: Plan of `evaluation_plan`.
        folder: Folder of the launch, with plan and request.

    Raises:
        UserError: A rank reports a mistake, or was killed.
        RuntimeError: A rank raised another error.
    """
    remove_abandoned_locks(extensions_folder())
    log = folder / STDERR_LOG
    with log.open("wb") as output:
        child = subprocess.Popen(  # noqa: S603
            local_argv(plan), env=launch_variables(plan), stdout=output, stderr=output, start_new_session=True
        )
        try:
            code = child.wait()
        finally:
            end_processes(plan)  # also after Ctrl-C
            child.wait()
    if code == 0:
        return
    failures = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob(FAILURES))]
    for failure in failures:
        if failure["mistake"] is not None:
            raise _mistake(failure["mistake"])
    if failures:
        raise RuntimeError(f"rank {failures[0]['rank']} failed:\n{failures[0]['message']}")
    lines = "\n".join(f"    {line}" for line in last_lines(log, LAST_LINES))
    raise UserError(
        f"the processes that measure ended with code {code}; their last lines ({relative(log)}):\n{lines}",
        "a rank was killed, mostly because the machine's memory was full.",
        "run the same command again, with more memory or another number of --ranks: answers so far are kept.",
        exit_code=EXIT_LOST,
    )


def _mistake(record: list[Any]) -> UserError:
    fact, why, fix, where, exit_code = record
    return UserError(fact, why, fix, where, exit_code)
