"""A rank's last phase is readable after its death, and the rank that others wait for is named."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from packhorse.run_folder.heartbeat import Heartbeat, HeartbeatWriter, find_hung_rank, read_heartbeats

BEATING = """
import sys, time
from pathlib import Path
from packhorse.run_folder.heartbeat import HeartbeatWriter
writer = HeartbeatWriter(Path(sys.argv[1]), 3)
writer.phase("backward", 7)
print("named", flush=True)
time.sleep(60)
"""
NOW = 1000.0


def beat(rank: int, **changes: object) -> Heartbeat:
    return replace(Heartbeat(rank, 1, "host", "forward", 5, NOW - 1, NOW - 1), **changes)


def started(folder: Path) -> subprocess.Popen[str]:
    child = subprocess.Popen([sys.executable, "-c", BEATING, str(folder)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "named\n"
    return child


def test_the_phase_of_a_killed_process_stays_readable(tmp_path: Path) -> None:
    with started(tmp_path) as child:
        child.kill()
    (last,) = read_heartbeats(tmp_path)
    assert (last.rank, last.pid, last.phase, last.step) == (3, child.pid, "backward", 7)


def test_a_stopped_process_falls_silent_and_a_living_one_does_not(tmp_path: Path) -> None:
    with started(tmp_path) as child:
        try:
            time.sleep(2.2)
            (living,) = read_heartbeats(tmp_path)
            assert time.time() - living.at < 1.8
            os.kill(child.pid, signal.SIGSTOP)
            time.sleep(2.2)
            (stopped,) = read_heartbeats(tmp_path)
            assert find_hung_rank([stopped], time.time(), 2.0) == stopped
        finally:
            child.kill()


def test_a_closed_heartbeat_is_no_hang(tmp_path: Path) -> None:
    writer = HeartbeatWriter(tmp_path, 0)
    writer.phase("save", 2)
    writer.close()
    writer.close()
    (last,) = read_heartbeats(tmp_path)
    assert last.phase == "end"
    assert find_hung_rank([last], time.time() + 1e6, 60) is None


def test_all_in_time_is_no_hang() -> None:
    assert find_hung_rank([beat(0), beat(1, since=NOW - 500)], NOW, 60) is None


def test_the_silent_rank_is_named_before_those_that_wait_for_it() -> None:
    silent = beat(1, at=NOW - 61, since=NOW - 62)
    assert find_hung_rank([beat(0, since=NOW - 61), silent], NOW, 60) == silent


def test_where_all_wait_the_rank_that_is_furthest_behind_is_named() -> None:
    # Its phase began later: the other rank has been waiting longer.
    behind = beat(1, phase="data", changes=40, since=NOW - 69)
    assert find_hung_rank([beat(0, phase="forward", changes=41, since=NOW - 70), behind], NOW, 60) == behind
    last = beat(1, changes=41, since=NOW - 65)
    assert find_hung_rank([beat(0, changes=41, since=NOW - 70), last], NOW, 60) == last


def test_phases_are_counted_when_they_change(tmp_path: Path) -> None:
    writer = HeartbeatWriter(tmp_path, 0)
    for phase, step in (("load", None), ("load", None), ("data", 3), ("forward", None), ("data", 4), ("data", 5)):
        writer.phase(phase, step)
    assert writer.last.changes == 5
    writer.close()


def test_a_half_written_heartbeat_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "heartbeat-0.json").write_bytes(b'{"rank": 0')
    assert read_heartbeats(tmp_path) == []
