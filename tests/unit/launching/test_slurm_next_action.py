"""What a job script does after an attempt has ended."""

from __future__ import annotations

from dataclasses import replace

import pytest

from packhorse.errors import EXIT_BUG, EXIT_DISK, EXIT_LOST, EXIT_MEMORY, EXIT_OK, EXIT_STOPPED, EXIT_USER_ERROR
from packhorse.launching.local.outcome import Outcome
from packhorse.launching.slurm.next_action import RunHistory, SlurmSignals, decide
from packhorse.run_folder.attempts import AttemptRecord

STOPPED = Outcome(EXIT_STOPPED, "stopped; it resumes from step 7", "stopped")
LOST = Outcome(EXIT_LOST, "rank 1 was killed", "rank 1 was killed")
CRASHED = Outcome(EXIT_BUG, "rank 0 failed: boom", "rank 0 failed: boom")


def attempt(outcome: str, message: str, step: int) -> AttemptRecord:
    return AttemptRecord(
        attempt=1, started_at=0, ended_at=1, first_step=0, last_step=step, outcome=outcome, message=message
    )


NO_SIGNAL = SlurmSignals()
TIME_IS_OVER = SlurmSignals(time_nearly_over=True)
JOB_ENDS = SlurmSignals(job_is_ending=True)
PLAIN = RunHistory(signalled=False, cancelled=False, num_without_progress=0, max_without_progress=3, attempts=())
TWICE = replace(PLAIN, attempts=(attempt("failed", "boom", 5), attempt("failed", "boom", 5)))
NO_PROGRESS = replace(PLAIN, num_without_progress=3)
SIGNALLED = replace(PLAIN, signalled=True)


@pytest.mark.parametrize(
    ("outcome", "signals", "history", "action", "code"),
    [
        (Outcome(EXIT_OK), TIME_IS_OVER, NO_PROGRESS, "finished", 0),
        (STOPPED, TIME_IS_OVER, PLAIN, "requeue", EXIT_STOPPED),
        (STOPPED, NO_SIGNAL, SIGNALLED, "requeue", EXIT_STOPPED),
        (STOPPED, NO_SIGNAL, PLAIN, "give-up", EXIT_STOPPED),
        (STOPPED, TIME_IS_OVER, replace(PLAIN, cancelled=True), "give-up", EXIT_STOPPED),
        (STOPPED, JOB_ENDS, SIGNALLED, "ended", EXIT_STOPPED),
        (STOPPED, JOB_ENDS, replace(SIGNALLED, cancelled=True), "give-up", EXIT_STOPPED),
        (STOPPED, TIME_IS_OVER, NO_PROGRESS, "give-up", EXIT_STOPPED),
        (LOST, NO_SIGNAL, PLAIN, "again", EXIT_LOST),
        (LOST, TIME_IS_OVER, PLAIN, "requeue", EXIT_STOPPED),
        (LOST, NO_SIGNAL, NO_PROGRESS, "give-up", EXIT_LOST),
        (LOST, NO_SIGNAL, replace(PLAIN, num_without_progress=2), "again", EXIT_LOST),
        (CRASHED, NO_SIGNAL, PLAIN, "again", EXIT_BUG),
        (CRASHED, NO_SIGNAL, TWICE, "give-up", EXIT_BUG),
        (Outcome(EXIT_DISK, "the disk is full"), NO_SIGNAL, PLAIN, "give-up", EXIT_DISK),
        (Outcome(EXIT_USER_ERROR, "a mistake"), TIME_IS_OVER, PLAIN, "give-up", EXIT_USER_ERROR),
        (Outcome(EXIT_STOPPED, headline="spike", again="rewind"), NO_SIGNAL, TWICE, "again", EXIT_STOPPED),
        (
            Outcome(EXIT_MEMORY, headline="oom", again="shrink"),
            TIME_IS_OVER,
            PLAIN,
            "requeue",
            EXIT_STOPPED,
        ),
    ],
    ids=[
        "finished",
        "time is over",
        "preempted",
        "stopped by the user",
        "cancelled as time was over",
        "ended by Slurm",
        "cancelled and ended",
        "time is over after three attempts without progress",
        "lost rank",
        "lost as time was over",
        "lost three times without progress",
        "lost twice without progress",
        "crash",
        "the same crash twice",
        "full disk",
        "mistake",
        "rewind",
        "shrink as time was over",
    ],
)
def test_the_next_action(outcome: Outcome, signals: SlurmSignals, history: RunHistory, action: str, code: int) -> None:
    decision = decide(outcome, signals, history)
    assert (decision.action, decision.exit_code) == (action, code)
    assert outcome.message in decision.reason


def test_a_run_that_gives_up_has_a_reason() -> None:
    assert "3 consecutive attempts made no progress" in decide(LOST, NO_SIGNAL, NO_PROGRESS).reason
    assert "failed at the same step with the same message" in decide(CRASHED, NO_SIGNAL, TWICE).reason
