"""What becomes of a run when an attempt in a job has ended: pure, so that every case can be looked at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from packhorse.errors import EXIT_OK, EXIT_STOPPED
from packhorse.launching.local.outcome import Outcome
from packhorse.launching.local.recovery import RETRY_EXIT_CODES, failed_alike
from packhorse.run_folder.attempts import AttemptRecord

Word = Literal["finished", "again", "requeue", "ended", "give-up"]


@dataclass(frozen=True)
class Asked:
    """What Slurm asked of the job script.

    Attributes:
        to_stop: Its time is nearly over.
        to_end: It is being ended, and Slurm decides what becomes of it.
    """

    to_stop: bool = False
    to_end: bool = False


@dataclass(frozen=True)
class Verdict:
    """What the job script does now.

    Attributes:
        word: finished. again: another attempt in this job, which has its nodes. requeue: the run goes on in another
            job. ended: Slurm decides. give-up: the run does not go on by itself.
        code: Exit code of the script, where it exits.
        why: For its log.
    """

    word: Word
    code: int
    why: str


@dataclass(frozen=True)
class Situation:
    """What counts beside how the attempt ended.

    Attributes:
        signalled: Some rank was asked by a signal to stop: on preemption, or by `scancel --signal`.
        cancelled: The user has cancelled the run.
        num_in_vain: Attempts in a row, this one the last, that have gained no step.
        most_in_vain: So many end it.
        attempts: All of the run; this one the last.
    """

    signalled: bool
    cancelled: bool
    num_in_vain: int
    most_in_vain: int
    attempts: Sequence[AttemptRecord]


def decide(outcome: Outcome, asked: Asked, situation: Situation) -> Verdict:
    """Decides from how the attempt ended.

    Args:
        outcome: Of the attempt.
        asked: What Slurm asked of the script.
        situation: What counts beside it.
    """
    code, told = outcome.exit_code, outcome.message or outcome.headline
    stopped = code == EXIT_STOPPED and outcome.again is None
    if code == EXIT_OK:
        return Verdict("finished", EXIT_OK, "the run is finished")
    if asked.to_end and not situation.cancelled:
        return Verdict("ended", code, f"{told}\nSlurm ends this job, and decides what becomes of it")
    against = _against(outcome, stopped and not (asked.to_stop or situation.signalled), situation)
    if against:
        return Verdict("give-up", code, f"{told}\n{against}")
    if asked.to_stop or stopped:
        return Verdict("requeue", EXIT_STOPPED, f"{told}\nthe run goes on when its job runs again")
    return Verdict("again", code, f"{told}\nstarting again on the same nodes")


def _against(outcome: Outcome, by_hand: bool, situation: Situation) -> str:
    """Why the run does not go on by itself; empty where it does."""
    failed = outcome.again is None and outcome.exit_code != EXIT_STOPPED
    if situation.cancelled:
        return "the run was cancelled"
    if by_hand:
        return "stopped by hand: it does not go on by itself"
    if failed and outcome.exit_code not in RETRY_EXIT_CODES:
        return "another attempt would end in the same way"
    if failed and failed_alike(situation.attempts):
        return "the attempt before failed at the same step with the same words"
    if situation.num_in_vain >= situation.most_in_vain:
        return f"{situation.num_in_vain} attempts in a row have gained no step"
    return ""
