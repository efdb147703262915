"""One attempt to run a plan on this machine: `accelerate launch` as a child, watched, ended whole, and judged."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from packhorse.launching.local.environment import (
    FOLDER_VARIABLE,
    extensions_folder,
    launch_environment,
    path_with_programs,
    remove_abandoned_locks,
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

LOOK_SECONDS = 0.25
AGENT_SECONDS = 2.0
"""How long torch's agent may take to say what killed a rank; it looks ten times a second."""


def launch(plan: RunPlan, stop: StopSignals) -> Outcome:
    """Makes one attempt, from its start until none of its processes lives, and records how it ended."""
    folder = Path(plan.run_folder)
    attempt, logs = next_attempt(folder)
    remove_abandoned_locks(extensions_folder())
    with (logs / STDERR_LOG).open("wb") as log:
        child = subprocess.Popen(  # noqa: S603
            _local_argv(plan),
            env=_environment(plan, attempt),
            stderr=log,
            start_new_session=True,
        )
        watch = RankWatcher(plan, logs)
        try:
            ending = _watched(child, watch, stop)
            ended_with = child.poll()
            if ending is not None and not stop.at_once:
                _hear_last_words(child, logs, watch, ending)
        finally:
            end_processes(plan)
            child.wait()
    outcome = _outcome(plan, logs, attempt, ending, ended_with, watch, stop)
    end_attempt(folder, attempt, outcome_of(outcome.exit_code, outcome.again), outcome.headline, time.time())
    return outcome


def _outcome(
    plan: RunPlan,
    logs: Path,
    attempt: int,
    ending: ForcedEnd | None,
    ended_with: int | None,
    watch: RankWatcher,
    stop: StopSignals,
) -> Outcome:
    status = read_status(Path(plan.run_folder))
    if stop.at_once and not (status is not None and status.state == "finished"):
        return stopped_outcome(plan, attempt, "ended at once, on request")
    if stop.asked and not watch.all_have_begun:
        return stopped_outcome(plan, attempt, "stopped before the ranks had begun")
    return determine_outcome(plan, logs, attempt, ending, ended_with)


def _watched(child: subprocess.Popen[bytes], watch: RankWatcher, stop: StopSignals) -> ForcedEnd | None:
    """Waits for the end of the child; returns why it must be ended from outside, where it must."""
    handed_on = False
    end_of_child = os.pidfd_open(child.pid)
    try:
        while True:
            stop.wait_with(end_of_child, LOOK_SECONDS)
            over = child.poll() is not None
            # Looked at even then: torch's agent may have ended all before we saw what it saw.
            ending = watch.look()
            if over or ending is not None or stop.at_once:
                return ending
            if stop.asked and not watch.all_have_begun:
                return None  # nothing is loaded yet: there is nothing to save
            if stop.asked and not handed_on:
                handed_on = True
                _ask_to_stop(watch)
    finally:
        os.close(end_of_child)


def _ask_to_stop(watch: RankWatcher) -> None:
    for rank in watch.living():
        with suppress(ProcessLookupError):
            os.kill(rank.pid, signal.SIGTERM)


def _hear_last_words(child: subprocess.Popen[bytes], logs: Path, watch: RankWatcher, ending: ForcedEnd) -> None:
    """Stacks of the ranks that live, and what killed the one that does not."""
    request_hang_report(logs, watch.living(), hang=ending.kind == "hung")
    end = time.monotonic() + AGENT_SECONDS
    while ending.kind == "dead" and child.poll() is None and time.monotonic() < end:
        if find_failure(logs, ending.heartbeat.pid):
            return
        time.sleep(0.05)


def _environment(plan: RunPlan, attempt: int) -> dict[str, str]:
    return {
        **os.environ,
        **launch_environment(plan.topology),
        "PATH": path_with_programs(os.environ),
        FOLDER_VARIABLE: str(extensions_folder()),
        ATTEMPT_VARIABLE: str(attempt),
        LAUNCHER_VARIABLE: process_identity(os.getpid()),
    }


def _local_argv(plan: RunPlan) -> list[str]:
    """The plan's argv with a free port, so that two runs can share a machine."""
    launcher, verb, *words = plan.argv
    return [launcher, verb, "--main_process_port", str(_free_port()), *words]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
