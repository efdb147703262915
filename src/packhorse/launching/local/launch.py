"""Make one attempt to run a plan on this machine: start `accelerate launch`, watch it, end it, read its outcome."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from packhorse.launching.local.environment import (
    FOLDER_VARIABLE,
    extensions_folder,
    launch_environment,
    path_with_programs,
    remove_abandoned_locks,
    without_other_launchers,
)
from packhorse.launching.local.failure_logs import find_failure
from packhorse.launching.local.hang_report import request_hang_report
from packhorse.launching.local.outcome import Outcome, determine_outcome, stopped_outcome
from packhorse.launching.local.stop_signals import StopSignals
from packhorse.launching.local.watch import ForcedEnd, RankWatcher, end_processes
from packhorse.plan.run_plan import ATTEMPT_VARIABLE, RunPlan
from packhorse.run_folder.attempts import end_attempt, outcome_of
from packhorse.run_folder.folder import next_attempt
from packhorse.run_folder.heartbeat import LAUNCHER_VARIABLE, process_identity
from packhorse.run_folder.layout import STDERR_LOG
from packhorse.run_folder.status import read_status

LOOK_SECONDS: Final = 0.25
AGENT_SECONDS: Final = 2.0
"""Time for torch's agent to log what killed a rank; it looks ten times per second."""


def launch(plan: RunPlan, stop: StopSignals) -> Outcome:
    """Make one attempt, from its start until none of its processes lives, and record its outcome."""
    folder = Path(plan.run_folder)
    attempt, logs = next_attempt(folder)
    remove_abandoned_locks(extensions_folder())
    with (logs / STDERR_LOG).open("wb") as log:
        child = subprocess.Popen(  # noqa: S603
            local_argv(plan), env=_environment(plan, attempt), stderr=log, start_new_session=True
        )
        watcher = RankWatcher(plan, logs)
        try:
            forced_end = _wait(child, watcher, stop)
            exit_code = child.poll()
            if forced_end is not None and not stop.at_once:
                _collect_reports(child, logs, watcher, forced_end)
        finally:
            end_processes(plan)
            child.wait()
    status = read_status(folder)
    if stop.at_once and not (status is not None and status.state == "finished"):
        outcome = stopped_outcome(plan, attempt, "ended at once, on request")
    elif stop.requested and not watcher.all_have_begun:
        outcome = stopped_outcome(plan, attempt, "stopped before the ranks had begun")
    else:
        outcome = determine_outcome(plan, logs, attempt, forced_end, exit_code)
    end_attempt(folder, attempt, outcome_of(outcome.exit_code, outcome.again), outcome.headline, time.time())
    return outcome


def _wait(child: subprocess.Popen[bytes], watcher: RankWatcher, stop: StopSignals) -> ForcedEnd | None:
    """Wait for the end of the child; return why it must be ended from outside, if it must."""
    forwarded = False
    end_of_child = os.pidfd_open(child.pid)
    try:
        while True:
            stop.wait_with(end_of_child, LOOK_SECONDS)
            has_ended = child.poll() is not None
            # Also after the end: torch's agent may have ended all ranks before the watcher saw the failure.
            forced_end = watcher.look()
            if has_ended or forced_end is not None or stop.at_once:
                return forced_end
            if stop.requested and not watcher.all_have_begun:
                return None  # nothing is loaded yet, so there is nothing to save
            if stop.requested and not forwarded:
                forwarded = True
                for rank in watcher.living():
                    with suppress(ProcessLookupError):
                        os.kill(rank.pid, signal.SIGTERM)
    finally:
        os.close(end_of_child)


def _collect_reports(child: subprocess.Popen[bytes], logs: Path, watcher: RankWatcher, forced_end: ForcedEnd) -> None:
    """Let the living ranks write their stacks, and wait until torch's agent has logged what killed the dead one."""
    request_hang_report(logs, watcher.living(), hang=forced_end.kind == "hung")
    end = time.monotonic() + AGENT_SECONDS
    while forced_end.kind == "dead" and child.poll() is None and time.monotonic() < end:
        if find_failure(logs, forced_end.heartbeat.pid):
            return
        time.sleep(0.05)


def _environment(plan: RunPlan, attempt: int) -> dict[str, str]:
    return {
        **launch_variables(plan),
        ATTEMPT_VARIABLE: str(attempt),
        LAUNCHER_VARIABLE: process_identity(os.getpid()),
    }


def launch_variables(plan: RunPlan) -> dict[str, str]:
    """Return the environment of `accelerate launch`."""
    return {
        **without_other_launchers(os.environ),
        **launch_environment(plan.topology),
        "PATH": path_with_programs(os.environ),
        FOLDER_VARIABLE: str(extensions_folder()),
    }


def local_argv(plan: RunPlan) -> list[str]:
    """Return the plan's argv with a free port, so that two runs can share a machine."""
    launcher, verb, *words = plan.argv
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [launcher, verb, "--main_process_port", str(port), *words]
