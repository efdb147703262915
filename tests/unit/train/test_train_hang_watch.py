"""A rank reads the other heartbeats only when its phase lasts too long, and names the rank that they wait for."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from packhorse.errors import EXIT_LOST
from packhorse.run_folder.heartbeat import Heartbeat
from packhorse.train.ranks import hang_watch
from packhorse.train.ranks.hang_watch import HangWatch

HANG = 30.0


class Run:
    """Three ranks that beat every second on a fake clock; rank 0 watches."""

    def __init__(self, logs: Path, hang_seconds: float = HANG) -> None:
        self.logs, self.now, self.silent = logs, 1000.0, {-1}
        beat = Heartbeat(0, 1, "node", "backward", 17, self.now, self.now, 0, changes=40)
        self.beats = {rank: replace(beat, rank=rank) for rank in range(3)}
        self.ended: list[tuple[int, str]] = []
        self.watch = HangWatch(logs, 3, hang_seconds, lambda: self.beats[0], self._end, lambda: self.now)

    def _end(self, waiting: Heartbeat) -> None:
        self.ended.append((waiting.rank, waiting.phase))

    def set_beat(self, rank: int, **changes: Any) -> None:
        self.beats[rank] = replace(self.beats[rank], **changes)

    def advance(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end and not self.ended:
            self.now += 1
            for rank in self.beats.keys() - self.silent:
                self.set_beat(rank, at=self.now)
                (self.logs / f"heartbeat-{rank}.json").write_text(json.dumps(asdict(self.beats[rank])))
            self.watch.beat()


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def test_no_heartbeat_is_read_while_the_run_advances(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(folder: Path) -> list[Heartbeat]:
        raise AssertionError("reading every heartbeat of a large run is not free")

    monkeypatch.setattr(hang_watch, "read_heartbeats", read)
    run.advance(HANG - 1)
    run.set_beat(0, since=run.now)
    run.advance(HANG - 1)
    assert run.ended == []


def test_the_rank_that_is_furthest_behind_is_named(run: Run) -> None:
    run.set_beat(2, phase="data", changes=39)
    run.advance(HANG)
    assert run.ended == []
    run.advance(15)
    assert run.ended == [(2, "data")]


def test_a_silent_rank_is_named_by_the_others(run: Run) -> None:
    run.advance(1)
    run.silent = {1}
    run.advance(HANG + 15)
    assert run.ended == [(1, "backward")]


def test_a_rank_that_renews_its_phase_keeps_all_waiting(run: Run) -> None:
    """Rank 2 writes a large checkpoint, and the others have nothing to write."""
    for _ in range(4):
        run.advance(25)
        run.set_beat(2, phase="save", since=run.now)
    assert run.ended == []
    run.advance(HANG + 15)
    assert run.ended


def test_a_rank_that_never_began_is_named_after_the_start_time(tmp_path: Path) -> None:
    run = Run(tmp_path, hang_seconds=100)
    for rank in (0, 1):
        run.set_beat(rank, phase="load", step=0, changes=1)
    run.silent = {2}
    run.advance(300)
    assert run.ended == []
    run.advance(115)
    assert run.ended == [(2, "start")]


def test_after_a_suspension_all_get_the_whole_time_again(run: Run) -> None:
    run.advance(10)
    run.now += 10 * HANG
    run.advance(HANG)
    assert run.ended == []
    run.advance(15)
    assert run.ended


def test_a_report_that_hangs_too_does_not_keep_the_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[tuple[int, str, int]] = []
    monkeypatch.setattr(hang_watch, "LONGEST_REPORT_SECONDS", 0.1)
    monkeypatch.setattr(hang_watch, "REPORT_SECONDS", 0.0)
    monkeypatch.setattr(os, "_exit", lambda code: recorded.append((code, "exit", -1)))
    never = threading.Event()
    waiting = Heartbeat(2, 1, "node", "backward", 17, 0.0, 0.0)
    hang_watch.end_hung(tmp_path, never.wait, lambda *record: recorded.append(record), waiting)
    never.set()
    assert recorded == [(EXIT_LOST, "rank 2 hung in phase backward", 2), (EXIT_LOST, "exit", -1)]
