"""What a job script does after an attempt has ended: a pure decision, so that every case can be tested."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from packhorse.errors import EXIT_OK, EXIT_STOPPED
from packhorse.launching.local.outcome import Outcome
from packhorse.launching.local.recovery import RETRY_EXIT_CODES, failed_alike
from packhorse.run_folder.attempts import AttemptRecord

Action = Literal["finished", "again", "requeue", "ended", "give-up"]


@dataclass(frozen=True)
class SlurmSignals:
    """Signals that Slurm has sent to the job script.

    Attributes:
        time_nearly_over: USR1: the time limit is near.
        job_is_ending: TERM: Slurm ends the job, and decides whether to requeue it.
    """

    time_nearly_over: bool = False
    job_is_ending: bool = False


@dataclass(frozen=True)
class NextAction:
    """What the job script does next.

    Attributes:
        action: finished. again: another attempt on the nodes of this job. requeue: another job resumes the run. ended:
            Slurm decides. give-up: the run is not resumed automatically.
        exit_code: Exit code of the script, if it exits.
        reason: Text for the job's log.
    """

    action: Action
    exit_code: int
    reason: str


@dataclass(frozen=True)
class RunHistory:
    """Facts for the decision besides the outcome of the attempt.

    Attributes:
        signalled: A signal to some rank requested the stop: on preemption, or by `scancel --signal`.
        cancelled: The user has cancelled the run.
        num_without_progress: Consecutive attempts without progress, up to and including this one.
        max_without_progress: Number of such attempts that ends the run.
        attempts: All attempts of the run, the newest last.
    """

    signalled: bool
    cancelled: bool
    num_without_progress: int
    max_without_progress: int
    attempts: Sequence[AttemptRecord]


def decide(outcome: Outcome, signals: SlurmSignals, history: RunHistory) -> NextAction:
    """Decide the next action from the outcome of the attempt that has just ended."""
    code, cause = outcome.exit_code, outcome.message or outcome.headline
    stopped = code == EXIT_STOPPED and outcome.again is None
    if code == EXIT_OK:
        return NextAction("finished", EXIT_OK, "the run is finished" + (f": {cause}" if cause else ""))
    if signals.job_is_ending and not history.cancelled:
        return NextAction("ended", code, f"{cause}\nSlurm ends this job and decides whether to requeue it")
    stopped_by_user = stopped and not (signals.time_nearly_over or history.signalled)
    obstacle = _reason_to_give_up(outcome, stopped_by_user, history)
    if obstacle:
        return NextAction("give-up", code, f"{cause}\n{obstacle}")
    if signals.time_nearly_over or stopped:
        return NextAction("requeue", EXIT_STOPPED, f"{cause}\nthe run resumes when its job runs again")
    return NextAction("again", code, f"{cause}\nstarting again on the same nodes")


def _reason_to_give_up(outcome: Outcome, stopped_by_user: bool, history: RunHistory) -> str:
    """Return why the run is not resumed automatically; empty if it is."""
    failed = outcome.again is None and outcome.exit_code != EXIT_STOPPED
    if history.cancelled:
        return "the run was cancelled"
    if stopped_by_user:
        return "stopped by the user: it is not resumed automatically"
    if failed and outcome.exit_code not in RETRY_EXIT_CODES:
        return "another attempt would end in the same way"
    if failed and failed_alike(history.attempts):
        return "the previous attempt failed at the same step with the same message"
    if history.num_without_progress >= history.max_without_progress:
        return f"{history.num_without_progress} consecutive attempts made no progress"
    return ""
