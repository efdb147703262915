"""A rank looks at the others only when it has been in one phase for too long; it names the one that they wait for."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from packhorse.run_folder.heartbeat import Heartbeat
from packhorse.train.ranks import standstill
from packhorse.train.ranks.standstill import Standstill

HANG = 30.0


class Run:
    """Three ranks that beat each second, on a clock that is set by hand; rank 0 looks."""

    def __init__(self, logs: Path, hang_seconds: float = HANG) -> None:
        self.logs, self.now, self.silent = logs, 1000.0, {-1}
        beat = Heartbeat(0, 1, "node", "backward", 17, self.now, self.now, 0, changes=40)
        self.beats = {rank: replace(beat, rank=rank) for rank in range(3)}
        self.ended: list[tuple[int, str]] = []
        self.watch = Standstill(logs, 3, hang_seconds, lambda: self.beats[0], self._end, lambda: self.now)

    def _end(self, waiting: Heartbeat) -> None:
        self.ended.append((waiting.rank, waiting.phase))

    def says(self, rank: int, **changes: Any) -> None:
        self.beats[rank] = replace(self.beats[rank], **changes)

    def go_on_for(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end and not self.ended:
            self.now += 1
            for rank in self.beats.keys() - self.silent:
                self.says(rank, at=self.now)
                (self.logs / f"heartbeat-{rank}.json").write_text(json.dumps(asdict(self.beats[rank])))
            self.watch.beat()


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def test_while_it_goes_on_no_heartbeat_is_read(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(folder: Path) -> list[Heartbeat]:
        raise AssertionError("a look at every heartbeat of a large run is not free")

    monkeypatch.setattr(standstill, "read_heartbeats", read)
    run.go_on_for(HANG - 1)
    run.says(0, since=run.now)
    run.go_on_for(HANG - 1)
    assert run.ended == []


def test_the_rank_that_is_furthest_behind_is_named(run: Run) -> None:
    run.says(2, phase="data", changes=39)
    run.go_on_for(HANG)
    assert run.ended == []
    run.go_on_for(15)
    assert run.ended == [(2, "data")]


def test_a_silent_rank_is_named_though_it_cannot_look_itself(run: Run) -> None:
    run.go_on_for(1)
    run.silent = {1}
    run.go_on_for(HANG + 15)
    assert run.ended == [(1, "backward")]


def test_a_rank_that_says_that_it_goes_on_keeps_all_waiting(run: Run) -> None:
    """Rank 2 writes a large checkpoint, and the others have nothing to write."""
    for _ in range(4):
        run.go_on_for(25)
        run.says(2, phase="save", since=run.now)
    assert run.ended == []
    run.go_on_for(HANG + 15)
    assert run.ended


def test_a_rank_that_never_began_is_named_after_the_time_that_a_start_may_take(tmp_path: Path) -> None:
    run = Run(tmp_path, hang_seconds=100)
    for rank in (0, 1):
        run.says(rank, phase="load", step=0, changes=1)
    run.silent = {2}
    run.go_on_for(300)
    assert run.ended == []
    run.go_on_for(115)
    assert run.ended == [(2, "start")]


def test_after_a_suspension_all_get_the_whole_time_again(run: Run) -> None:
    run.go_on_for(10)
    run.now += 10 * HANG
    run.go_on_for(HANG)
    assert run.ended == []
    run.go_on_for(15)
    assert run.ended
