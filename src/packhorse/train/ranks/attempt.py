"""This rank's part in one attempt, and the files that it leaves in RUN/logs/attempt-N.

heartbeat-R.json   current phase, and since when
stacks-R.txt       stack of each thread, written on SIGUSR1
collectives-R.json last collectives, written when a hang is about to be ended
rank-R.log         standard error, where the launcher separates the ranks
rank-R.json        how the rank ended
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch._C import _distributed_c10d

from packhorse.durable import replace_file
from packhorse.errors import UserError
from packhorse.plan.run_plan import ATTEMPT_VARIABLE, RANK_LOGS_VARIABLE
from packhorse.run_folder.attempts import read_rank_records
from packhorse.run_folder.heartbeat import LAUNCHER_VARIABLE, HeartbeatWriter
from packhorse.run_folder.layout import (
    ATTEMPT_FOLDERS,
    COLLECTIVES,
    LOGS_FOLDER,
    RANK_LOGS,
    RANK_RECORDS,
    STACKS,
    numbered,
)
from packhorse.secrets import mask
from packhorse.train.ranks.hang_watch import HangWatch, end_hung
from packhorse.train.ranks.signals import StopRequest

Again = Literal["rewind", "shrink"]

RECORDERS = {"nccl": "_dump_nccl_trace_json", "gloo": "_dump_fr_trace_json"}
"""Backend -> the function that dumps its flight recorder as JSON; a torch built without NCCL lacks the first."""


class AnotherAttempt(UserError):  # noqa: N818  (a request, no error)
    """Ends every rank; RUN/logs/attempt-N/rank-R.json names in `again` what the launcher starts next.

    rewind: resume from the newest complete checkpoint, with the recorded steps skipped.
    shrink: resume from the newest complete checkpoint, with smaller micro-batches.
    """

    def __init__(self, again: Again, fact: str, why: str, fix: str, exit_code: int) -> None:
        self.again: Again = again
        super().__init__(fact, why, fix, exit_code=exit_code)


class Attempt:
    """What this process knows about its attempt.

    Attributes:
        number: Number of the attempt, counted from 1 over the run's life.
        signals: Whether this process was requested to stop.
        pulse: Heartbeat that names the current phase.
    """

    def __init__(self, number: int, rank: int, logs: Path, signals: StopRequest) -> None:
        self.number = number
        self.signals = signals
        self.pulse = HeartbeatWriter(logs, rank)
        self._rank, self._logs = rank, logs
        # Open for the whole life of the process: a signal handler cannot open files.
        self._stacks = (logs / numbered(STACKS, rank)).open("w", encoding="utf-8")
        faulthandler.register(signal.SIGUSR1, file=self._stacks, all_threads=True)
        self.pulse.on_report_request(self._write_collectives)

    def begins_at(self, step: int) -> None:
        """Record the step of the checkpoint that this attempt resumes from; 0 for none."""
        self.pulse.phase("load", step)

    def still_loading(self) -> None:
        """Renew the heartbeat while the model is loaded.

        Raises:
            Stopped: This process was requested to stop.
        """
        self.pulse.phase("load")
        self.signals.raise_if_requested()

    def still_before_training(self) -> None:
        """Renew the heartbeat while a model runs over the data before training.

        Raises:
            Stopped: This process was requested to stop.
        """
        self.pulse.phase("prior")
        self.signals.raise_if_requested()

    def watch_others(self, world_size: int, hang_seconds: float) -> None:
        """End this rank when the run hangs, unless Packhorse's launcher watches it from outside."""
        if os.environ.get(LAUNCHER_VARIABLE):
            return
        self.pulse.on_report_request(self._write_hang_report)
        end = partial(end_hung, self._logs, self._write_hang_report, self._record_hang)
        self.pulse.on_each_beat(HangWatch(self._logs, world_size, hang_seconds, lambda: self.pulse.last, end).beat)

    def record(self, code: int, message: str, again: str | None = None, hung: int | None = None) -> None:
        """Write how this rank ended.

        Args:
            code: Exit code.
            message: Reason of the end; empty where the rank ended normally.
            again: Kind of attempt that the launcher starts next.
            hung: Rank that this one waited for too long.
        """
        self.pulse.exit_if_launcher_is_gone()
        record = {
            "rank": self._rank,
            "time": time.time(),
            "exit_code": code,
            "message": mask(message),
            "again": again,
            "hung": hung,
            "signalled": self.signals.requested,
        }
        replace_file(self._logs / numbered(RANK_RECORDS, self._rank), json.dumps(record) + "\n", on_disk=False)
        if message:
            sys.stderr.write(f"rank {self._rank}: {message}\n")
            sys.stderr.flush()

    def hang_found_by_another(self) -> tuple[str, int] | None:
        """Return message and hung rank of another rank that has ended this attempt because it hung; else None.

        That rank closes its connections as it ends, so a collective of this rank that fails afterwards is no cause.
        """
        found = (record for record in read_rank_records(self._logs) if record["hung"] is not None)
        return next(((record["message"], record["hung"]) for record in found), None)

    def _record_hang(self, code: int, message: str, hung: int) -> None:
        self.record(code, message, hung=hung)

    def _write_hang_report(self) -> None:
        faulthandler.dump_traceback(self._stacks, all_threads=True)
        self._write_collectives()

    def _write_collectives(self) -> None:
        write_collectives(self._logs / numbered(COLLECTIVES, self._rank))


def open_attempt(run_folder: Path, signals: StopRequest) -> Attempt:
    """Start this rank's log, its heartbeat and its stack dumps on SIGUSR1."""
    number = int(os.environ.get(ATTEMPT_VARIABLE, "1"))
    rank = int(os.environ.get("RANK", "0"))
    logs = run_folder / LOGS_FOLDER / numbered(ATTEMPT_FOLDERS, number)
    logs.mkdir(parents=True, exist_ok=True)
    if os.environ.get(RANK_LOGS_VARIABLE):
        log = os.open(logs / numbered(RANK_LOGS, rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, sys.stderr.fileno())
        os.close(log)
    return Attempt(number, rank, logs, signals)


def write_collectives(path: Path) -> None:
    """Write the last collectives of this process by backend, the latest last, to show which one hangs.

    Torch's flight recorder is on by default (TORCH_FR_BUFFER_SIZE). Only its JSON form is used: the other is a pickle.
    """
    dumps: dict[str, Any] = {}
    for backend, name in RECORDERS.items():
        dump = getattr(_distributed_c10d, name, None)
        if dump is not None:
            dumps[backend] = json.loads(dump(True, False))  # collectives too, and not only those in progress
    replace_file(path, json.dumps(dumps) + "\n", on_disk=False)
