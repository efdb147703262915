"""The condition of each job of a run or a sweep, and why a job waits, failed or did not run.

Slurm forgets a job some minutes after its end (MinJobAge), unless the site has accounting. The run folder therefore
decides: status.json for training, plan.json for preparing, a line of RUN/ended.jsonl for any other job.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from packhorse.durable import read_lines
from packhorse.errors import EXIT_NO_GO
from packhorse.launching.slurm.client import JobState, SlurmClient
from packhorse.plan.run_plan import PlanPart
from packhorse.run_folder.jobs import JobKind, JobRecord, read_jobs
from packhorse.run_folder.layout import ENDED_FILE
from packhorse.run_folder.status import Status
from packhorse.run_folder.sweep import member_folders

Condition = Literal["done", "failed", "not run", "waits", "runs", "replaced", "unknown"]
JobsWithStates = list[tuple[JobRecord, JobState | None]]
REASONS: Final = {
    "Priority": "jobs with a higher priority start first",
    "Resources": "the requested nodes are busy",
    "DependencyNeverSatisfied": "a job that it depends on failed",
    "BeginTime": "its earliest start time is not reached; after a requeue Slurm waits up to two minutes",
    "PartitionTimeLimit": "it requests more time than the partition allows",
    "PartitionNodeLimit": "it requests more nodes than the partition allows",
    "PartitionDown": "the partition is down",
    "PartitionInactive": "the partition starts no jobs now",
    "ReqNodeNotAvail": "a node that it needs is down, drained or reserved",
    "Reservation": "its reservation has not begun",
    "Licenses": "it waits for a licence",
    "JobArrayTaskLimit": "the maximum number of tasks of its array is running",
    "JobHeldUser": "it is held; `scontrol release` lets it start",
    "JobHeldAdmin": "an administrator holds it",
    "launch_failed_requeued_held": "it could not be started and is held; `scontrol release` tries again",
    "JobHoldMaxRequeue": "it was requeued more often than this site allows and is held",
    "NodeDown": "a node went down",
    "TimeLimit": "it reached its time limit",
    "OutOfMemory": "it used more memory than it had requested",
    "NonZeroExitCode": "its script failed",
}
"""Slurm's reason codes (https://slurm.schedmd.com/squeue.html, job reason codes) in words."""
KINDS_IN_ORDER: Final[tuple[JobKind, ...]] = ("doctor", "prepare", "train", "evaluate", "verify")
"""Kinds of job in the order in which they run."""
SCRIPT_EXIT_CODES: Final = {
    "2": "a user error, shown in its log",
    "20": "the doctor found a broken node, shown in its log",
    "30": "consecutive attempts made no progress",
    "75": "it was requested to stop",
}
"""Exit codes of slurm/job.sbatch that no rank has reported."""
LIMIT_REASONS: Final = ("QOS", "Assoc", "Max")
ARRAY_TASKS: Final = re.compile(r"(\d+)(?:-(\d+)(?::(\d+))?)?")


class JobEnd(PlanPart):
    """End of a job that does not train; one line of RUN/ended.jsonl."""

    job_id: str
    kind: JobKind
    ended_at: float
    exit_code: int


@dataclass(frozen=True)
class JobReport:
    """One job of a run.

    Attributes:
        record: The job as submitted.
        state: State in Slurm; None if Slurm has forgotten the job or is not on this machine.
        condition: `not run`: a job that it depends on failed. `replaced`: a newer job has the same task. `unknown`: it
            may be live, and Slurm did not answer.
        reason: Reason for the condition; empty if there is nothing to add.
    """

    record: JobRecord
    state: JobState | None
    condition: Condition
    reason: str = ""


def read_ends(run_folder: Path) -> dict[str, JobEnd]:
    """Return the last recorded end of each job, by number."""
    return {end.job_id: end for end in read_lines(run_folder / ENDED_FILE, JobEnd)}


def report_jobs(
    jobs: Sequence[tuple[JobRecord, JobState | None]],
    ends: Mapping[str, JobEnd],
    run_status: Status | None,
    has_data: bool,
    slurm_answered: bool = True,
) -> list[JobReport]:
    """Report each job of a run, in the order of submission.

    Args:
        jobs: All jobs of one run, as `with_states` returns them.
        ends: Recorded ends of jobs.
        run_status: Status of the run.
        has_data: Whether the run's data is prepared.
        slurm_answered: False if Slurm did not answer: a job without a recorded end may then be live.
    """
    live = {record.job_id for record, state in jobs if state is not None and state.is_live}
    # At a site without requeue a job that continues another one waits from the start. If the first job succeeds, Slurm
    # cancels that successor: it did no work, so it is neither the newest job of its kind nor anybody's dependency.
    unused = {record.job_id for record, state in jobs if record.goes_on_from and _is_cancelled(state)}
    newest = {record.kind: record.job_id for record, _ in jobs if record.job_id not in unused}
    # A successor counts in place of its predecessor only after that one has ended.
    still_first = {None, *live, *(record.goes_on_from for record, _ in jobs if record.job_id in unused)}
    successors = {record.goes_on_from: record.job_id for record, _ in jobs if record.goes_on_from not in still_first}
    is_finished = run_status is not None and run_status.state == "finished"
    reports: dict[str, JobReport] = {}
    for record, state in sorted(jobs, key=lambda job: KINDS_IN_ORDER.index(job[0].kind)):
        dependencies = [_newest_successor(job_id, successors) for job_id in record.depends_on]
        depends_on = [reports[job_id] for job_id in dependencies if job_id in reports]
        is_done = {"prepare": has_data or is_finished, "train": is_finished}.get(record.kind, False)
        report = _report(record, state, ends.get(record.job_id), run_status, depends_on, is_done)
        if record.job_id in unused:
            report = JobReport(record, state, "replaced", f"job {record.goes_on_from} did not need a successor")
        elif newest[record.kind] != record.job_id and record.job_id not in live:
            report = JobReport(record, state, "replaced", f"replaced by job {newest[record.kind]}")
        lacks_end = state is None and record.job_id not in ends
        if lacks_end and not slurm_answered and report.condition in ("failed", "not run"):
            report = JobReport(record, state, "unknown", "Slurm is not available on this machine")
        reports[record.job_id] = report
    return [reports[record.job_id] for record, _ in jobs]


def _is_cancelled(state: JobState | None) -> bool:
    return state is not None and state.state == "CANCELLED"


def _newest_successor(job_id: str, successors: Mapping[str | None, str]) -> str:
    while job_id in successors:
        job_id = successors[job_id]
    return job_id


def _report(
    record: JobRecord,
    state: JobState | None,
    end: JobEnd | None,
    run_status: Status | None,
    depends_on: Sequence[JobReport],
    is_done: bool,
) -> JobReport:
    """Report one job; `is_done`: the run folder holds its result."""
    if state is not None and state.is_live:
        return _report_live(record, state, depends_on)
    if is_done:
        return JobReport(record, state, "done")
    if end is not None:
        condition: Condition = "failed" if end.exit_code else "done"
        return JobReport(record, state, condition, _end_reason(end))
    broken = next((report for report in depends_on if report.condition in ("failed", "not run", "replaced")), None)
    if broken is not None:
        verb = "did not run" if broken.condition == "not run" else "did not succeed"
        return JobReport(record, state, "not run", f"job {broken.record.job_id} ({broken.record.kind}) {verb}")
    if state is not None and state.state == "COMPLETED" and record.kind in ("evaluate", "verify", "doctor"):
        return JobReport(record, state, "done")
    return JobReport(record, state, "failed", _failure_reason(state, run_status if record.kind == "train" else None))


def _report_live(record: JobRecord, state: JobState, depends_on: Sequence[JobReport]) -> JobReport:
    if not state.is_waiting:
        return JobReport(record, state, "runs")
    if record.goes_on_from and state.reason == "Dependency":
        return JobReport(record, state, "waits", f"it starts only if job {record.goes_on_from} does not finish")
    pending = [report for report in depends_on if report.condition != "done"]
    if pending and state.reason == "Dependency":
        names = " and ".join(f"job {report.record.job_id} ({report.record.kind})" for report in pending)
        return JobReport(record, state, "waits", f"it starts after {names} succeeds")
    return JobReport(record, state, "waits", describe_reason(state.reason))


def describe_reason(reason: str) -> str:
    """Return Slurm's reason in words, with Slurm's own text behind; empty for an empty one."""
    if not reason:
        return ""
    # Slurm adds node names to some reasons: `ReqNodeNotAvail, UnavailableNodes:node2`.
    code = reason.partition(",")[0].strip("()")
    if code in REASONS:
        return f"{REASONS[code]} ({reason})"
    if code.startswith(LIMIT_REASONS):
        return f"a limit of the account, user or QOS is reached ({reason})"
    return reason


def _end_reason(end: JobEnd) -> str:
    """Return the reason for the end of a job that does not train; empty for success."""
    if end.kind == "evaluate" and end.exit_code == EXIT_NO_GO:
        return "gate: NO-GO"
    return f"exit code {end.exit_code}" if end.exit_code else ""


def _failure_reason(state: JobState | None, run_status: Status | None) -> str:
    if run_status is not None and run_status.state in ("failed", "stopped") and run_status.message:
        return run_status.message.splitlines()[0]
    if state is None:
        return "it ended without a record, and Slurm has forgotten it"
    from_script = SCRIPT_EXIT_CODES.get(state.exit_code.partition(":")[0]) if run_status is not None else None
    # The reason of a job that was cancelled in the queue still says why it waited.
    is_stale = state.state == "CANCELLED" and state.reason != "DependencyNeverSatisfied"
    reason = from_script or ("" if is_stale else describe_reason(state.reason))
    code = f", exit code {state.exit_code}" if state.exit_code not in ("", "0:0") else ""
    return f"{state.state}{code}" + (f": {reason}" if reason else "")


def jobs_of_runs(sweep_folder: Path) -> dict[Path, JobsWithStates]:
    """Return each run of a sweep with its jobs and their states in Slurm; a whole array costs one query.

    Raises:
        UserError: The sweep cannot be read.
        NoSlurmError: There is no Slurm here, and there are jobs.
        SlurmError: Slurm does not answer.
    """
    records = {run: read_jobs(run) for run in member_folders(sweep_folder)}
    ids = dict.fromkeys(job.job_id.partition("_")[0] for jobs in records.values() for job in jobs)
    states = SlurmClient().job_states(list(ids)) if ids else {}
    return {run: [(job, find_state(job.job_id, states)) for job in jobs] for run, jobs in records.items()}


def find_state(job_id: str, states: Mapping[str, JobState]) -> JobState | None:
    """Find the state of a job or array task; tasks that wait together share one state, `12_[3-5,7%2]`."""
    if job_id in states:
        return states[job_id]
    array, _, task = job_id.partition("_")
    groups = {name.partition("_[")[2].rstrip("]"): state for name, state in states.items() if f"{array}_[" in name}
    return next((state for tasks, state in groups.items() if task and int(task) in _task_numbers(tasks)), None)


def _task_numbers(tasks: str) -> set[int]:
    """Parse `3-5,7,8-12:2%4`; the number after `%` limits how many run at once (sbatch(1), --array)."""
    numbers: set[int] = set()
    for first, last, step in ARRAY_TASKS.findall(tasks.partition("%")[0]):
        numbers |= set(range(int(first), int(last or first) + 1, int(step or 1)))
    return numbers
