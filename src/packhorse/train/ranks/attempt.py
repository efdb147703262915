"""One rank's part in an attempt, and what it leaves in RUN/logs/attempt-N.

heartbeat-R.json   what it does, and since when
stacks-R.txt       where its threads stand, written when SIGUSR1 asks for it
collectives-R.json its last collectives, written when a hang is about to be ended
rank-R.log         its standard error, where the launcher keeps that of each rank apart
rank-R.json        how it ended
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

from packhorse.durable import replace_file
from packhorse.plan.run_plan import ATTEMPT_VARIABLE, RANK_LOGS_VARIABLE
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
from packhorse.train.ranks.collectives import write_collectives
from packhorse.train.ranks.signals import StopRequest
from packhorse.train.ranks.standstill import Standstill, end_hung


class Attempt:
    """What one process knows of the attempt that it is part of.

    Attributes:
        number: Counted from 1 over the run's life.
        signals: Whether this process was asked to stop.
        pulse: Says what it does.
    """

    def __init__(self, number: int, rank: int, logs: Path, signals: StopRequest) -> None:
        self.number = number
        self.signals = signals
        self.pulse = HeartbeatWriter(logs, rank)
        self._rank, self._logs = rank, logs
        # Open for the whole life of the process: a handler cannot open files.
        self._stacks = (logs / numbered(STACKS, rank)).open("w", encoding="utf-8")
        faulthandler.register(signal.SIGUSR1, file=self._stacks, all_threads=True)
        self.pulse.on_report_request(self._write_collectives)

    def begins_at(self, step: int) -> None:
        """Says which step's checkpoint it goes on from; 0: none."""
        self.pulse.phase("load", step)

    def loads_on(self) -> None:
        """Called while loading.

        Raises:
            Stopped: This process was asked to stop.
        """
        self.pulse.phase("load")
        self.signals.raise_if_requested()

    def watch_others(self, world_size: int, hang_seconds: float) -> None:
        """Ends this rank where the run stands still, unless a launcher of ours watches it from outside."""
        if os.environ.get(LAUNCHER_VARIABLE):
            return
        self.pulse.on_report_request(self._say_last_words)
        end = partial(end_hung, self._logs, self._say_last_words, self._record_hang)
        self.pulse.on_each_beat(Standstill(self._logs, world_size, hang_seconds, lambda: self.pulse.last, end).beat)

    def record(self, code: int, message: str, again: str | None = None, hung: int | None = None) -> None:
        """Writes how this rank ended.

        Args:
            code: Its exit code.
            message: What it has to say; empty where it ended in order.
            again: Why the launcher is to start another attempt by itself.
            hung: The rank that it has waited for too long.
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

    def _record_hang(self, code: int, message: str, hung: int) -> None:
        self.record(code, message, hung=hung)

    def _write_collectives(self) -> None:
        write_collectives(self._logs / numbered(COLLECTIVES, self._rank))

    def _say_last_words(self) -> None:
        faulthandler.dump_traceback(self._stacks, all_threads=True)
        self._write_collectives()


def open_attempt(run_folder: Path, signals: StopRequest) -> Attempt:
    """Begins this rank's part: its log, its heartbeat, and its stacks on demand."""
    number = int(os.environ.get(ATTEMPT_VARIABLE, "1"))
    rank = int(os.environ.get("RANK", "0"))
    logs = run_folder / LOGS_FOLDER / numbered(ATTEMPT_FOLDERS, number)
    logs.mkdir(parents=True, exist_ok=True)
    if os.environ.get(RANK_LOGS_VARIABLE):
        log = os.open(logs / numbered(RANK_LOGS, rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, sys.stderr.fileno())
        os.close(log)
    return Attempt(number, rank, logs, signals)
