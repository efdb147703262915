"""What became of each job of a run, and of a chain of them why the rest do not run.

Slurm forgets a job some minutes after its end (MinJobAge), unless the site keeps accounts. So what counts is what the
run folder says: status.json of training, plan.json of preparing, a line in RUN/ended.jsonl of any other job.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from packhorse.durable import append_line, read_lines
from packhorse.launching.slurm.client import JobState
from packhorse.plan.run_plan import PlanPart
from packhorse.run_folder.jobs import JobKind, JobRecord
from packhorse.run_folder.layout import ENDED_FILE
from packhorse.run_folder.status import Status

Became = Literal["done", "failed", "not run", "waits", "runs", "replaced", "unknown"]
REASONS: Final = {
    "Priority": "other jobs come first",
    "Resources": "the nodes that it asks for are busy",
    "DependencyNeverSatisfied": "a job that it waits for did not end well",
    "BeginTime": "its earliest start has not come; after a requeue Slurm waits up to two minutes",
    "PartitionTimeLimit": "it asks for more time than the partition allows",
    "PartitionNodeLimit": "it asks for more nodes than the partition allows",
    "PartitionDown": "the partition is closed",
    "PartitionInactive": "the partition starts no jobs now",
    "ReqNodeNotAvail": "a node that it needs is down, drained or reserved",
    "Reservation": "its reservation has not begun",
    "Licenses": "it waits for a licence",
    "JobArrayTaskLimit": "as many tasks of its array run as may at once",
    "JobHeldUser": "it is held; `scontrol release` lets it go on",
    "JobHeldAdmin": "an administrator holds it",
    "launch_failed_requeued_held": "it could not be started and is held; `scontrol release` tries again",
    "JobHoldMaxRequeue": "it was queued again too often for this site and is held",
    "NodeDown": "a node went down",
    "TimeLimit": "its time was over",
    "OutOfMemory": "it took more memory than it had asked for",
    "NonZeroExitCode": "its script failed",
}
"""Slurm's words for why a job waits or ended (https://slurm.schedmd.com/squeue.html, job reason codes)."""
ORDER: Final[tuple[JobKind, ...]] = ("doctor", "prepare", "train", "evaluate", "verify")
"""Kinds of job as they follow each other."""
SCRIPT_CODES: Final = {
    "2": "a mistake, told in its log",
    "20": "a node cannot do its part, told in its log",
    "30": "attempts in a row gained no step",
    "75": "it was asked to stop",
}
"""Exit codes of slurm/job.sbatch that no rank has told."""
LIMITS: Final = ("QOS", "Assoc", "Max")


class StageEnd(PlanPart):
    """How a job that is no training ended."""

    job_id: str
    kind: JobKind
    ended_at: float
    exit_code: int


@dataclass(frozen=True)
class Stage:
    """One job of a run.

    Attributes:
        record: As it was submitted.
        state: What Slurm knows of it; None where it has forgotten it, or is not here.
        became: `not run`: one that it waits for did not end well. `replaced`: the same was submitted again. `unknown`:
            it may live; there is no Slurm here to ask.
        why: In words; empty where there is nothing to say.
    """

    record: JobRecord
    state: JobState | None
    became: Became
    why: str = ""


def record_end(run_folder: Path, kind: JobKind, job_id: str, exit_code: int) -> None:
    """Adds a line to RUN/ended.jsonl, and waits until it is on disk."""
    append_line(run_folder / ENDED_FILE, StageEnd(job_id=job_id, kind=kind, ended_at=time.time(), exit_code=exit_code))


def read_ends(run_folder: Path) -> dict[str, StageEnd]:
    """By job; of one that was queued again the last."""
    return {end.job_id: end for end in read_lines(run_folder / ENDED_FILE, StageEnd)}


def stages_of(
    jobs: Sequence[tuple[JobRecord, JobState | None]],
    ends: Mapping[str, StageEnd],
    now: Status | None,
    has_data: bool,
    asked: bool = True,
) -> list[Stage]:
    """What became of each job, in the order in which they were submitted.

    Args:
        jobs: Those of one run, as `with_states` gives them.
        ends: What the jobs said when they ended.
        now: The run's status.
        has_data: Its data is prepared.
        asked: Slurm was asked; else a job that has not told its end may live.
    """
    live = {record.job_id for record, state in jobs if state is not None and state.is_live}
    stood_by = {record.job_id for record, state in jobs if record.goes_on_from and _is_cancelled(state)}
    newest = {record.kind: record.job_id for record, _ in jobs if record.job_id not in stood_by}
    standing = {None, *live, *(record.goes_on_from for record, _ in jobs if record.job_id in stood_by)}
    follows = {record.goes_on_from: record.job_id for record, _ in jobs if record.goes_on_from not in standing}
    is_finished = now is not None and now.state == "finished"
    became: dict[str, Stage] = {}
    for record, state in sorted(jobs, key=lambda job: ORDER.index(job[0].kind)):
        waits_for = [
            became[each] for each in (_last(number, follows) for number in record.depends_on) if each in became
        ]
        done = {"prepare": has_data or is_finished, "train": is_finished}.get(record.kind, False)
        stage = _stage(record, state, ends.get(record.job_id), now, waits_for, done)
        if record.job_id in stood_by:
            stage = Stage(record, state, "replaced", f"job {record.goes_on_from} needed nobody to go on with its work")
        elif newest[record.kind] != record.job_id and record.job_id not in live:
            stage = Stage(record, state, "replaced", f"job {newest[record.kind]} took its place")
        if state is None and not asked and stage.became in ("failed", "not run") and record.job_id not in ends:
            stage = Stage(record, state, "unknown", "there is no Slurm here to ask")
        became[record.job_id] = stage
    return [became[record.job_id] for record, _ in jobs]


def _is_cancelled(state: JobState | None) -> bool:
    return state is not None and state.state == "CANCELLED"


def _last(job_id: str, follows: Mapping[str | None, str]) -> str:
    """The job that goes on with the work of this one now; one that stands by while this one lives does not yet."""
    while job_id in follows:
        job_id = follows[job_id]
    return job_id


def _stage(
    record: JobRecord,
    state: JobState | None,
    end: StageEnd | None,
    now: Status | None,
    waits_for: Sequence[Stage],
    done: bool,
) -> Stage:
    """What became of a job; `done`: the run folder holds what it was to make."""
    if state is not None and state.is_live:
        return _live(record, state, waits_for)
    if done:
        return Stage(record, state, "done")
    if end is not None:
        return Stage(record, state, "failed" if end.exit_code else "done", _exit_words(end.exit_code))
    broken = next((each for each in waits_for if each.became in ("failed", "not run", "replaced")), None)
    if broken is not None:
        return Stage(record, state, "not run", f"job {broken.record.job_id} ({broken.record.kind}) {_did(broken)}")
    if state is not None and state.state == "COMPLETED" and record.kind in ("evaluate", "verify", "doctor"):
        return Stage(record, state, "done")
    return Stage(record, state, "failed", _end_words(state, now if record.kind == "train" else None))


def _live(record: JobRecord, state: JobState, waits_for: Sequence[Stage]) -> Stage:
    if not state.is_waiting:
        return Stage(record, state, "runs")
    if record.goes_on_from and state.reason == "Dependency":
        return Stage(record, state, "waits", f"it begins only if job {record.goes_on_from} is cut short")
    before = [each for each in waits_for if each.became != "done"]
    if before and state.reason == "Dependency":
        names = " and ".join(f"job {each.record.job_id} ({each.record.kind})" for each in before)
        return Stage(record, state, "waits", f"it begins when {names} has ended well")
    return Stage(record, state, "waits", reason_words(state.reason))


def reason_words(reason: str) -> str:
    """Why a job waits, or ended, in words and with Slurm's own word."""
    if not reason:
        return ""
    # Of some reasons Slurm adds which node: `ReqNodeNotAvail, UnavailableNodes:node2`.
    word = reason.partition(",")[0].strip("()")
    if word in REASONS:
        return f"{REASONS[word]} ({reason})"
    if word.startswith(LIMITS):
        return f"a limit of the account, user or QOS is reached ({reason})"
    return reason


def _end_words(state: JobState | None, now: Status | None) -> str:
    if now is not None and now.state in ("failed", "stopped") and now.message:
        return now.message.splitlines()[0]
    if state is None:
        return "it ended without a word, and Slurm has forgotten it"
    own = SCRIPT_CODES.get(state.exit_code.partition(":")[0]) if now is not None else None
    # Of a job that was cancelled while it waited, the reason is still why it waited.
    stale = state.state == "CANCELLED" and state.reason != "DependencyNeverSatisfied"
    said = own or ("" if stale else reason_words(state.reason))
    code = f", exit code {state.exit_code}" if state.exit_code not in ("", "0:0") else ""
    return f"{state.state}{code}" + (f": {said}" if said else "")


def _exit_words(code: int) -> str:
    return f"exit code {code}" if code else ""


def _did(stage: Stage) -> str:
    return "did not run" if stage.became == "not run" else "did not end well"
