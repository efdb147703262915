"""Which failures start another attempt, and how often; the attempts themselves are scripted."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching_cases import Ranks, planned

from packhorse.errors import (
    EXIT_BUG,
    EXIT_DISK,
    EXIT_LOST,
    EXIT_MEMORY,
    EXIT_NOT_FINITE,
    EXIT_OK,
    EXIT_STOPPED,
    EXIT_USER_ERROR,
    UserError,
)
from packhorse.launching.local import recovery
from packhorse.launching.local.outcome import Outcome
from packhorse.launching.local.recovery import run_to_end
from packhorse.launching.local.stop_signals import StopSignals
from packhorse.launching.local.watch import processes_of
from packhorse.plan.run_plan import RunPlan, read_plan
from packhorse.run_folder.attempts import end_attempt, outcome_of, read_attempts
from packhorse.run_folder.folder import next_attempt
from packhorse.run_folder.layout import ATTEMPTS_FILE
from packhorse.run_folder.skipped_steps import write_skipped_steps

LOST = Outcome(EXIT_LOST, "lost", "rank 1 was killed")
DONE = Outcome(EXIT_OK)


class Script:
    """Replaces `launch`: returns outcomes in order, each one step later unless `steps` are given."""

    def __init__(self, plan: RunPlan, *outcomes: Outcome, steps: tuple[int, ...] = ()) -> None:
        self.folder = Path(plan.run_folder)
        self.outcomes = list(outcomes)
        self.steps = list(steps)
        self.plans: list[RunPlan] = []
        self.lines: list[str] = []

    def launch(self, plan: RunPlan, stop: StopSignals) -> Outcome:
        attempt, logs = next_attempt(self.folder)
        step = self.steps.pop(0) if self.steps else attempt
        Heartbeats(logs).write(step)
        outcome = self.outcomes.pop(0)
        self.plans.append(plan)
        end_attempt(self.folder, attempt, outcome_of(outcome.exit_code, outcome.again), outcome.headline, time.time())
        return outcome

    def run(self, restarts: int, stop: StopSignals | None = None) -> Outcome:
        return run_to_end(read_plan(self.folder), restarts, stop or StopSignals(), self.lines.append)


class Heartbeats:
    def __init__(self, logs: Path) -> None:
        self.file = logs / "heartbeat-0.json"

    def write(self, step: int) -> None:
        text = f'"rank": 0, "pid": 1, "host": "h", "phase": "data", "step": {step}, "since": 0, "at": 0'
        self.file.write_text(f"{{{text}}}")


@pytest.fixture
def plan(tmp_path: Path) -> RunPlan:
    return planned(tmp_path, batch={"packs": 8, "length": 64, "micro": 2})


@pytest.fixture
def scripted(plan: RunPlan, monkeypatch: pytest.MonkeyPatch):
    def make(*outcomes: Outcome, steps: tuple[int, ...] = ()) -> Script:
        script = Script(plan, *outcomes, steps=steps)
        monkeypatch.setattr(recovery, "launch", script.launch)
        return script

    return make


def test_a_lost_rank_is_started_again_as_often_as_allowed(scripted) -> None:
    script = scripted(LOST, LOST, DONE)
    assert script.run(restarts=2).exit_code == EXIT_OK
    assert [line.split("; ")[1] for line in script.lines] == [
        "starting again from step 0 (restart 1 of 2)",
        "starting again from step 0 (restart 2 of 2)",
    ]
    assert [attempt.outcome for attempt in read_attempts(script.folder)] == ["lost", "lost", "finished"]


def test_without_restarts_nothing_is_started_again(scripted) -> None:
    script = scripted(LOST, DONE)
    assert script.run(restarts=0) == LOST
    assert script.outcomes == [DONE]


@pytest.mark.parametrize("code", [EXIT_USER_ERROR, EXIT_DISK, EXIT_STOPPED])
def test_a_repeatable_failure_or_a_requested_stop_is_never_started_again(scripted, code: int) -> None:
    script = scripted(Outcome(code, "m", "m"), DONE)
    assert script.run(restarts=5).exit_code == code
    assert script.outcomes == [DONE]


@pytest.mark.parametrize("code", [EXIT_BUG, EXIT_NOT_FINITE, EXIT_MEMORY])
def test_the_same_failure_at_the_same_step_is_not_tried_a_third_time(scripted, code: int) -> None:
    failed = Outcome(code, "m", "rank 0 failed: ValueError: 7")
    script = scripted(failed, failed, DONE, steps=(12, 12, 12))
    assert script.run(restarts=5) == failed
    assert "same step with the same message" in script.lines[-1]
    assert script.outcomes == [DONE]


def test_the_same_failure_at_a_later_step_is_tried_again(scripted) -> None:
    failed = Outcome(EXIT_BUG, "m", "rank 0 failed: ValueError: 7")
    assert scripted(failed, failed, DONE, steps=(12, 13, 20)).run(restarts=5).exit_code == EXIT_OK


def test_a_rank_lost_twice_at_one_step_is_tried_again(scripted) -> None:
    assert scripted(LOST, LOST, DONE, steps=(0, 0, 40)).run(restarts=2).exit_code == EXIT_OK


def test_a_stop_ends_it_whatever_the_attempt_was(scripted) -> None:
    stop = StopSignals()
    stop.ranks_may_run()
    stop.requested = True
    script = scripted(LOST, DONE)
    assert script.run(5, stop) == LOST
    assert script.outcomes == [DONE]


def test_a_rewind_is_no_restart_but_needs_a_new_step_to_skip(scripted, plan: RunPlan) -> None:
    again = Outcome(EXIT_NOT_FINITE, "spike", "a spike at step 9", again="rewind")
    script = scripted(again, again, DONE)
    launch = script.launch

    def and_skip(plan: RunPlan, stop: StopSignals) -> Outcome:
        outcome = launch(plan, stop)
        if len(script.outcomes) == 2:
            write_skipped_steps(script.folder, {9: "spike"})
        return outcome

    recovery.launch = and_skip  # the fixture puts the real one back
    assert script.run(restarts=0) == again, "the second one skipped no further step: it would repeat forever"
    assert script.lines == [f"{script.folder}: a spike at step 9; starting again from step 0"]
    assert [attempt.outcome for attempt in read_attempts(script.folder)] == ["rewound", "rewound"]


def test_out_of_memory_shrinks_the_passes_until_they_hold_one_pack(scripted, plan: RunPlan) -> None:
    shrink = Outcome(EXIT_MEMORY, "oom", "out of memory", again="shrink")
    script = scripted(shrink, shrink)
    assert plan.batch.micro_packs == 2
    assert script.run(restarts=0) == shrink
    assert [(each.batch.micro_packs, each.batch.accumulation_steps) for each in script.plans] == [(2, 2), (1, 4)]
    assert read_plan(script.folder).batch.micro_packs == 1
    assert (script.folder / "plan-1.json").is_file()
    assert "1 packs per pass, 4 passes per step" in script.lines[0]


def test_ranks_of_a_dead_launcher_are_ended_first(scripted, plan: RunPlan, monkeypatch) -> None:
    monkeypatch.setenv("PACKHORSE_LAUNCHER", "1:1")
    ranks = Ranks(plan, Path(plan.run_folder) / "logs" / "attempt-1")
    try:
        script = scripted(DONE)
        assert script.run(restarts=0).exit_code == EXIT_OK
        assert processes_of(plan) == []
        first, second = read_attempts(script.folder)
        assert (first.outcome, first.last_step, second.outcome) == ("killed", 5, "finished")
        assert len((script.folder / ATTEMPTS_FILE).read_text().splitlines()) == 2
    finally:
        ranks.end()


def test_ranks_of_a_launch_typed_by_hand_are_refused_and_left_alone(scripted, plan: RunPlan) -> None:
    ranks = Ranks(plan, Path(plan.run_folder) / "logs" / "attempt-1")
    try:
        script = scripted(DONE)
        with pytest.raises(UserError, match=r"is run by process \d+, which `accelerate launch` started here"):
            script.run(restarts=0)
        assert len(processes_of(plan)) == 2
        assert script.outcomes == [DONE]
    finally:
        ranks.end()


def test_a_rank_whose_launcher_is_gone_ends_itself(tmp_path: Path) -> None:
    code = (
        "import os, sys, time; from pathlib import Path; from packhorse.run_folder.heartbeat import HeartbeatWriter;"
        "from packhorse.run_folder.heartbeat import process_identity;"
        "os.environ['PACKHORSE_LAUNCHER'] = process_identity(os.getppid());"
        "HeartbeatWriter(Path(sys.argv[1]), 0); print('beats', os.getpid(), flush=True); time.sleep(60)"
    )
    launcher = (
        "import subprocess, sys, time;"
        "subprocess.Popen([sys.executable, '-c', sys.argv[1], sys.argv[2]]); time.sleep(60)"
    )
    words = [sys.executable, "-c", launcher, code, str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as parent:
        assert parent.stdout is not None
        rank = int(parent.stdout.readline().split()[1])
        time.sleep(1.5)
        os.kill(rank, 0)  # lives as long as its launcher does
        parent.kill()
        end = time.monotonic() + 5
        while Path(f"/proc/{rank}/cmdline").exists() and Path(f"/proc/{rank}/cmdline").read_bytes():
            assert time.monotonic() < end
            time.sleep(0.05)
