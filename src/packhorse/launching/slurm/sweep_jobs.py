"""The jobs of every run of a sweep: Slurm is asked once for a whole array, not once for each of its tasks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from packhorse.launching.slurm.client import JobState, job_states
from packhorse.run_folder.jobs import JobRecord, read_jobs
from packhorse.run_folder.sweep import member_folder, read_sweep

TASKS: Final = re.compile(r"(\d+)(?:-(\d+)(?::(\d+))?)?")
Jobs = list[tuple[JobRecord, JobState | None]]


def jobs_of_runs(sweep_folder: Path) -> dict[Path, Jobs]:
    """Each run of a sweep with its jobs and what Slurm knows of them.

    Raises:
        UserError: The sweep cannot be read.
        NoSlurmError: There is no Slurm here, and there are jobs.
        SlurmError: Slurm does not answer.
    """
    runs = [member_folder(sweep_folder, member.number) for member in read_sweep(sweep_folder).runs]
    records = {run: read_jobs(run) for run in runs}
    ids = dict.fromkeys(record.job_id.partition("_")[0] for each in records.values() for record in each)
    states = job_states(list(ids)) if ids else {}
    return {run: [(record, state_of(record.job_id, states)) for record in each] for run, each in records.items()}


def state_of(job_id: str, states: Mapping[str, JobState]) -> JobState | None:
    """What is known of a job, or of a task that waits together with others: those have one state, `12_[3-5,7%2]`."""
    if job_id in states:
        return states[job_id]
    array, _, task = job_id.partition("_")
    groups = {name.partition("_[")[2].rstrip("]"): state for name, state in states.items() if f"{array}_[" in name}
    return next((state for tasks, state in groups.items() if task and int(task) in _numbers(tasks)), None)


def _numbers(tasks: str) -> set[int]:
    """Of `3-5,7,8-12:2%4`; behind `%` stands how many may run at once (sbatch(1), --array)."""
    found: set[int] = set()
    for first, last, step in TASKS.findall(tasks.partition("%")[0]):
        found |= set(range(int(first), int(last or first) + 1, int(step or 1)))
    return found
