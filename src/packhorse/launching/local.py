"""Runs a plan on this machine: `accelerate launch` as a child, signals handed on, the first failing rank shown."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from packhorse.errors import EXIT_BUG, EXIT_OK, EXIT_STOPPED, EXIT_USER_ERROR
from packhorse.launching.extensions import FOLDER_VARIABLE, extensions_folder, remove_abandoned_locks
from packhorse.launching.run_folder import next_attempt, relative
from packhorse.plan.run_plan import ATTEMPT_VARIABLE, RunPlan
from packhorse.record.status import Status, read_status, write_status

LAST_LINES = 12


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended.

    Attributes:
        exit_code: 0 finished, 75 stopped and resumable, 2 a user's mistake, 1 anything else.
        message: What to show; empty if all is well.
    """

    exit_code: int
    message: str


def launch(plan: RunPlan) -> Outcome:
    """Runs the plan to its end. Ctrl-C and SIGTERM ask the ranks to save and stop; a second one ends them at once."""
    folder = Path(plan.run_folder)
    attempt, logs = next_attempt(folder)
    remove_abandoned_locks(extensions_folder())
    with (logs / "stderr.log").open("wb") as log:
        child = subprocess.Popen(  # noqa: S603
            _local_argv(plan),
            env=_environment(plan, attempt),
            stderr=log,
            start_new_session=True,
        )
        with _handing_on_signals(child, plan):
            child.wait()
    _end_what_is_left(plan)
    return _judge(folder, logs, attempt)


def _environment(plan: RunPlan, attempt: int) -> dict[str, str]:
    """Ours, with the programs that lie beside this Python first: accelerate, and ninja for what DeepSpeed builds."""
    programs = Path(sys.executable).parent
    return {
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "OMP_NUM_THREADS": str(plan.topology.threads_per_process),
        FOLDER_VARIABLE: str(extensions_folder()),
        ATTEMPT_VARIABLE: str(attempt),
        # Else torch's agent kills the ranks 30 s after a SIGTERM, in the middle of a long save.
        "PET_SIGNALS_TO_HANDLE": "SIGINT",
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


@contextmanager
def _handing_on_signals(child: subprocess.Popen[bytes], plan: RunPlan) -> Iterator[None]:
    asked = False

    def hand_on(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            _end_what_is_left(plan)
            return
        asked = True
        sys.stderr.write("\nstopping: the ranks finish this step and save (once more to end at once)\n")
        ranks = [process for process, words in _processes_of(plan) if b"launch" not in words]
        for rank in ranks:
            os.kill(rank, signal.SIGTERM)
        if not ranks:
            child.terminate()

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_what_is_left(plan: RunPlan) -> None:
    """Ends launcher and ranks of just this run: no rank outlives it.

    torch's agent gives each rank a session of its own, so that no process group holds them all; their command lines
    end in the launched script and this run's plan, and nobody else's do.
    """
    for process, _ in _processes_of(plan):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def _processes_of(plan: RunPlan) -> list[tuple[int, list[bytes]]]:
    """Process number and command line of this run's launcher and ranks."""
    last_words = [os.fsencode(word) for word in plan.argv[-2:]]
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (process / "cmdline").read_bytes().split(b"\0")
            if words[-3:-1] == last_words:
                found.append((int(process.name), words))
    return found


def _judge(folder: Path, logs: Path, attempt: int) -> Outcome:
    """Reads what the ranks left: exit codes do not survive the agent between them and us."""
    status = read_status(folder)
    records = [json.loads(path.read_text(encoding="utf-8")) for path in logs.glob("rank-*.json")]
    failures = sorted((r for r in records if r["exit_code"] not in (EXIT_OK, EXIT_STOPPED)), key=lambda r: r["time"])
    # Who stopped before any step did not wait for the others, who then miss it: what came first is the cause.
    stops = [r["time"] for r in records if r["exit_code"] == EXIT_STOPPED]
    if status is not None and stops and failures and min(stops) < failures[0]["time"]:
        failures, status = [], status.model_copy(update={"state": "stopped", "message": ""})
        write_status(folder, status)
    if failures:
        first = failures[0]
        lines = first["message"].strip().splitlines()
        if first["exit_code"] == EXIT_USER_ERROR:
            return Outcome(EXIT_USER_ERROR, "\n".join(lines))
        return Outcome(EXIT_BUG, _failure(f"rank {first['rank']} failed", lines, logs))
    if status is not None and status.attempt != attempt:
        status = status.model_copy(update={"state": "starting", "attempt": attempt})  # it tells of an earlier attempt
    if status is not None and status.state == "finished":
        return Outcome(EXIT_OK, "")
    if status is not None and status.state == "stopped":
        return Outcome(EXIT_STOPPED, _stopped(folder, status))
    _mark_failed(folder, status, "the ranks ended without a word")
    tail = (logs / "stderr.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return Outcome(EXIT_BUG, _failure("the ranks ended without a word", tail, logs))


def _stopped(folder: Path, status: Status) -> str:
    go_on = f"packhorse train {relative(folder)} --resume"
    return f"stopped at step {status.step} of {status.num_steps}; go on with: {go_on}"


def _failure(head: str, lines: list[str], logs: Path) -> str:
    return "\n".join([f"{head}; its last lines (all of it in {logs}):", *("  " + line for line in lines[-LAST_LINES:])])


def _mark_failed(folder: Path, status: Status | None, message: str) -> None:
    if status is not None:
        write_status(folder, status.model_copy(update={"state": "failed", "message": message}))
