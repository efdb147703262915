"""What becomes of a run when an attempt in a job has ended."""

from __future__ import annotations

from dataclasses import replace

import pytest

from packhorse.errors import EXIT_BUG, EXIT_DISK, EXIT_LOST, EXIT_MEMORY, EXIT_OK, EXIT_STOPPED, EXIT_USER_ERROR
from packhorse.launching.local.outcome import Outcome
from packhorse.launching.slurm.next_action import Asked, Situation, decide
from packhorse.run_folder.attempts import AttemptRecord

STOPPED = Outcome(EXIT_STOPPED, "stopped; it goes on from step 7", "stopped")
LOST = Outcome(EXIT_LOST, "rank 1 was killed", "rank 1 was killed")
CRASHED = Outcome(EXIT_BUG, "rank 0 failed: boom", "rank 0 failed: boom")


def attempt(outcome: str, message: str, step: int) -> AttemptRecord:
    return AttemptRecord(
        attempt=1, started_at=0, ended_at=1, first_step=0, last_step=step, outcome=outcome, message=message
    )


PLAIN = Situation(signalled=False, cancelled=False, num_in_vain=0, most_in_vain=3, attempts=())
TWICE = replace(PLAIN, attempts=(attempt("failed", "boom", 5), attempt("failed", "boom", 5)))
IN_VAIN = replace(PLAIN, num_in_vain=3)
SIGNALLED = replace(PLAIN, signalled=True)


@pytest.mark.parametrize(
    ("outcome", "asked", "situation", "word", "code"),
    [
        (Outcome(EXIT_OK), Asked(to_stop=True), IN_VAIN, "finished", 0),
        (STOPPED, Asked(to_stop=True), PLAIN, "requeue", EXIT_STOPPED),
        (STOPPED, Asked(), SIGNALLED, "requeue", EXIT_STOPPED),
        (STOPPED, Asked(), PLAIN, "give-up", EXIT_STOPPED),
        (STOPPED, Asked(to_stop=True), replace(PLAIN, cancelled=True), "give-up", EXIT_STOPPED),
        (STOPPED, Asked(to_end=True), SIGNALLED, "ended", EXIT_STOPPED),
        (STOPPED, Asked(to_end=True), replace(SIGNALLED, cancelled=True), "give-up", EXIT_STOPPED),
        (STOPPED, Asked(to_stop=True), IN_VAIN, "give-up", EXIT_STOPPED),
        (LOST, Asked(), PLAIN, "again", EXIT_LOST),
        (LOST, Asked(to_stop=True), PLAIN, "requeue", EXIT_STOPPED),
        (LOST, Asked(), IN_VAIN, "give-up", EXIT_LOST),
        (LOST, Asked(), replace(PLAIN, num_in_vain=2), "again", EXIT_LOST),
        (CRASHED, Asked(), PLAIN, "again", EXIT_BUG),
        (CRASHED, Asked(), TWICE, "give-up", EXIT_BUG),
        (Outcome(EXIT_DISK, "the disk is full"), Asked(), PLAIN, "give-up", EXIT_DISK),
        (Outcome(EXIT_USER_ERROR, "a mistake"), Asked(to_stop=True), PLAIN, "give-up", EXIT_USER_ERROR),
        (Outcome(EXIT_STOPPED, headline="spike", again="rewind"), Asked(), TWICE, "again", EXIT_STOPPED),
        (Outcome(EXIT_MEMORY, headline="oom", again="shrink"), Asked(to_stop=True), PLAIN, "requeue", EXIT_STOPPED),
    ],
    ids=[
        "finished",
        "time is over",
        "preempted",
        "stopped by hand",
        "cancelled as time was over",
        "ended by Slurm",
        "cancelled and ended",
        "time is over three times in vain",
        "lost rank",
        "lost as time was over",
        "lost three times in vain",
        "lost twice in vain",
        "crash",
        "the same crash twice",
        "full disk",
        "mistake",
        "rewind",
        "shrink as time was over",
    ],
)
def test_the_verdict(outcome: Outcome, asked: Asked, situation: Situation, word: str, code: int) -> None:
    verdict = decide(outcome, asked, situation)
    assert (verdict.word, verdict.code) == (word, code)
    assert outcome.message in verdict.why


def test_a_run_that_gives_up_says_why() -> None:
    assert "3 attempts in a row have gained no step" in decide(LOST, Asked(), IN_VAIN).why
    assert "failed at the same step with the same words" in decide(CRASHED, Asked(), TWICE).why
