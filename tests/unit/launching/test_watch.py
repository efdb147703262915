"""An attempt is ended from outside if a rank is gone, hangs, or has failed while others wait; never otherwise."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from launching_cases import NOW, Ranks, planned

from packhorse.errors import EXIT_BUG, EXIT_LOST, EXIT_NOT_FINITE, EXIT_OK, EXIT_STOPPED
from packhorse.launching.local.outcome import determine_outcome
from packhorse.launching.local.watch import RankWatcher, end_processes, processes_of
from packhorse.plan.run_plan import RunPlan
from packhorse.run_folder.status import Status, read_status, write_status

PEER_GONE = "Traceback\nRuntimeError: [gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:9132"


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def plan(tmp_path: Path) -> RunPlan:
    return planned(tmp_path)


@pytest.fixture
def logs(plan: RunPlan) -> Path:
    return Path(plan.run_folder) / "logs" / "attempt-1"


@pytest.fixture
def ranks(plan: RunPlan, logs: Path) -> Iterator[Ranks]:
    started = Ranks(plan, logs)
    yield started
    started.end()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def watch(plan: RunPlan, logs: Path, ranks: Ranks, clock: Clock) -> RankWatcher:
    return RankWatcher(plan, logs, clock)


def wait_until(condition) -> None:
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def look_until(watch: RankWatcher, clock: Clock, moment: float):
    """Look every second, as a launcher that never sleeps."""
    while clock.now < moment:
        clock.now += 1
        ending = watch.look()
        if ending is not None:
            return ending
    return None


def test_while_all_ranks_make_progress_nothing_is_ended(watch: RankWatcher) -> None:
    assert watch.look() is None


def test_a_rank_that_was_killed_is_named_with_phase_and_step(
    plan: RunPlan, logs: Path, watch: RankWatcher, ranks: Ranks
) -> None:
    ranks.beat(1, phase="backward", step=11)
    ranks.kill(1)
    wait_until(lambda: watch.look() is not None)
    ranks.record(0, EXIT_BUG, PEER_GONE)  # what the other rank reports is a consequence
    pid = ranks.processes[1].pid
    (logs / "stderr.log").write_text(f"E1121 failed (exitcode: -9) local_rank: 1 (pid: {pid}) of binary: python\n")
    (logs / "rank-1.log").write_text("the last line of rank 1\n")
    outcome = determine_outcome(plan, logs, 1, watch.look())
    assert outcome.exit_code == EXIT_LOST
    assert outcome.headline == "rank 1 was killed by SIGKILL in phase backward of step 12"
    assert "the last line of rank 1" in outcome.message
    assert "packhorse resume " in outcome.message
    status = read_status(Path(plan.run_folder))
    assert status is not None
    assert (status.state, status.message) == ("failed", outcome.headline)


def test_of_two_dead_the_one_that_the_agent_saw_first_is_named(watch: RankWatcher, logs: Path, ranks: Ranks) -> None:
    ranks.kill(0)
    ranks.kill(1)
    pid = ranks.processes[1].pid
    (logs / "stderr.log").write_text(f"failed (exitcode: -11) local_rank: 1 (pid: {pid}) of binary: python\n")
    wait_until(lambda: watch.look() is not None and not watch.living())
    ending = watch.look()
    assert ending is not None
    assert (ending.kind, ending.heartbeat.rank) == ("dead", 1)


def test_a_failure_of_its_own_is_the_cause_and_not_the_rank_that_died_of_it(
    plan: RunPlan, logs: Path, watch: RankWatcher, ranks: Ranks, clock: Clock
) -> None:
    assert watch.look() is None
    ranks.record(1, EXIT_BUG, "Traceback\nValueError: a bug")
    ranks.kill(0)  # as NCCL's watchdog does
    wait_until(lambda: not any(beat.rank == 0 for beat in watch.living()))
    ending = look_until(watch, clock, NOW + 10)
    assert ending is not None
    outcome = determine_outcome(plan, logs, 1, ending)
    assert outcome.exit_code == EXIT_BUG
    assert outcome.headline == "rank 1 failed: ValueError: a bug"


def test_the_others_of_a_failed_rank_are_ended_within_five_seconds(
    watch: RankWatcher, ranks: Ranks, clock: Clock
) -> None:
    ranks.record(1, EXIT_NOT_FINITE, "the loss is nan")
    assert watch.look() is None, "the others may still report something"
    ending = look_until(watch, clock, NOW + 5)
    assert ending is not None
    assert ending.kind == "left"


def test_a_stop_of_one_rank_before_the_first_step_is_no_failure_of_the_others(
    plan: RunPlan, logs: Path, ranks: Ranks
) -> None:
    ranks.record(1, EXIT_STOPPED, "stopped before the first step")
    ranks.record(0, EXIT_BUG, PEER_GONE, at=NOW + 1)
    outcome = determine_outcome(plan, logs, 1, None)
    assert outcome.exit_code == EXIT_STOPPED
    status = read_status(Path(plan.run_folder))
    assert status is not None
    assert status.state == "stopped"


def test_of_two_failures_the_cause_is_reported_whichever_was_written_first(
    plan: RunPlan, logs: Path, ranks: Ranks
) -> None:
    ranks.record(0, EXIT_BUG, "Traceback\nRuntimeError: another rank failed: ValueError('a bug')", at=NOW)
    ranks.record(1, EXIT_BUG, "Traceback\n  retry(connection)\nValueError: a bug", at=NOW + 1)
    assert determine_outcome(plan, logs, 1, None).headline == "rank 1 failed: ValueError: a bug"


def test_a_launch_that_was_killed_from_outside_is_no_bug(plan: RunPlan, logs: Path, ranks: Ranks) -> None:
    (logs / "stderr.log").touch()
    outcome = determine_outcome(plan, logs, 1, None, ended_with=-9)
    assert (outcome.exit_code, outcome.headline) == (EXIT_LOST, "accelerate launch was killed by SIGKILL")
    assert determine_outcome(plan, logs, 1, None, ended_with=1).exit_code == EXIT_BUG


def test_a_rank_that_is_stopped_is_a_hang_after_hang_seconds(
    plan: RunPlan, logs: Path, watch: RankWatcher, ranks: Ranks, clock: Clock
) -> None:
    os.kill(ranks.processes[1].pid, signal.SIGSTOP)
    for second in range(1, 59):
        ranks.beat(0, at=NOW + second, since=NOW - 1)
        assert look_until(watch, clock, NOW + second) is None
    ranks.beat(0, at=NOW + 62, since=NOW - 1)
    ending = look_until(watch, clock, NOW + 62)
    assert ending is not None
    outcome = determine_outcome(plan, logs, 1, ending)
    assert outcome.exit_code == EXIT_LOST
    assert outcome.headline == "rank 1 hung (stopped by a signal) in phase forward of step 6"


def test_a_launcher_that_slept_blames_no_rank_for_it(watch: RankWatcher, ranks: Ranks, clock: Clock) -> None:
    clock.now = NOW + 3600  # a suspended machine: no rank has written anything
    assert watch.look() is None
    assert look_until(watch, clock, NOW + 3600 + 58) is None
    ending = look_until(watch, clock, NOW + 3600 + 62)
    assert ending is not None
    assert ending.kind == "hung"


def test_importing_may_take_longer_than_a_step(plan: RunPlan, tmp_path: Path, clock: Clock) -> None:
    watch = RankWatcher(plan, tmp_path / "empty", clock)
    assert look_until(watch, clock, NOW + 299) is None
    ending = look_until(watch, clock, NOW + 302)
    assert ending is not None
    assert (ending.kind, ending.heartbeat.phase) == ("hung", "start")
    assert not watch.all_have_begun


def test_a_heartbeat_that_is_torn_once_makes_no_rank_unborn(watch: RankWatcher, logs: Path) -> None:
    watch.look()
    (logs / "heartbeat-1.json").write_text('{"rank": 1')
    assert watch.look() is None
    assert watch.all_have_begun


def test_processes_that_stay_after_an_orderly_end_are_ended_after_a_minute(
    plan: RunPlan, watch: RankWatcher, logs: Path, ranks: Ranks, clock: Clock
) -> None:
    for rank in (0, 1):
        ranks.beat(rank, phase="end", step=40)
        ranks.record(rank, EXIT_OK)
    assert look_until(watch, clock, NOW + 59) is None
    ending = look_until(watch, clock, NOW + 62)
    assert ending is not None
    assert ending.kind == "stuck"
    write_status(Path(plan.run_folder), Status(state="finished", step=40, num_steps=40, attempt=1))
    assert determine_outcome(plan, logs, 1, ending).exit_code == EXIT_OK


def test_only_this_runs_processes_are_ended(plan: RunPlan, tmp_path: Path, ranks: Ranks) -> None:
    other = planned(tmp_path / "other")
    others = Ranks(other, tmp_path / "other-logs")
    try:
        end_processes(plan)
        assert processes_of(plan) == []
        assert [process.wait(1) for process in ranks.processes] == [-9, -9]
        assert len(processes_of(other)) == 2
    finally:
        others.end()
