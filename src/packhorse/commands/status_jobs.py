"""The lines of `packhorse status` about a run's jobs: what each does, why one waits, why the rest do not run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from packhorse.launching.local.failure_logs import find_first_failure
from packhorse.launching.slurm.client import JobState, NoSlurmError, SlurmError
from packhorse.launching.slurm.job_reports import JobReport, read_ends, report_jobs
from packhorse.launching.slurm.jobs import with_states
from packhorse.plan.run_plan import read_plan
from packhorse.run_folder.attempts import AttemptRecord
from packhorse.run_folder.folder import relative
from packhorse.run_folder.jobs import JobRecord, read_jobs
from packhorse.run_folder.layout import CANCEL_FILE
from packhorse.run_folder.status import read_status

LABELS = {
    "waits": "waits",
    "done": "done",
    "failed": "did not end well",
    "not run": "does not run",
    "unknown": "unknown",
}


def read_stages(run_folder: Path) -> tuple[list[JobReport], str]:
    """The jobs of a run and what became of them; beside it why Slurm does not tell, empty where it does."""
    records = read_jobs(run_folder)
    try:
        jobs = with_states(records)
    except (NoSlurmError, SlurmError) as error:
        return stages_of_run(run_folder, [(record, None) for record in records], asked=False), error.mistakes[0].fact
    return stages_of_run(run_folder, jobs, asked=True), ""


def stages_of_run(run_folder: Path, jobs: Sequence[tuple[JobRecord, JobState | None]], asked: bool) -> list[JobReport]:
    """What became of these jobs of a run.

    Args:
        run_folder: The run's.
        jobs: Its own, with what Slurm knows of them.
        asked: Slurm was asked.
    """
    if not jobs:
        return []
    has_data = read_plan(run_folder).data is not None
    return report_jobs(jobs, read_ends(run_folder), read_status(run_folder), has_data, asked)


def job_lines(run_folder: Path, stages: Sequence[JobReport], silent: str) -> list[tuple[str, str]]:
    """A line a job, those that others took the place of in one; then what to do where some did not end well."""
    shown = [stage for stage in stages if stage.condition != "replaced"]
    earlier = [f"{stage.record.job_id} ({stage.record.kind})" for stage in stages if stage.condition == "replaced"]
    lines = [("jobs before", ", ".join(earlier))] if earlier else []
    lines += [("job", f"{stage.record.job_id} {stage.record.kind}: {words_of(stage)}") for stage in shown]
    if silent:
        lines.append(("Slurm", f"what its jobs do now is not known: {silent}"))
    broken = any(stage.condition in ("failed", "not run") for stage in shown)
    if broken and not any(stage.condition in ("waits", "runs") for stage in shown):
        first = "it was cancelled" if (run_folder / CANCEL_FILE).exists() else "mend what failed"
        lines.append(("next", f"{first}; `packhorse resume {relative(run_folder)}` goes on from there"))
    return lines


def words_of(stage: JobReport) -> str:
    """What a job does, in words."""
    state = stage.state
    if stage.condition == "runs" and state is not None:
        again = f", queued again {state.restarts} time{'s' * (state.restarts > 1)}" if state.restarts else ""
        since = f" since {clock(state.expected_start)}" if state.expected_start else ""
        limit = f", time limit {state.time_limit}" if state.time_limit else ""
        ends = "" if state.state == "RUNNING" else f" ({state.state})"
        return f"runs{ends} on {state.nodes}{since}{limit}{again}"
    said = LABELS[stage.condition] + (f": {stage.reason}" if stage.reason else "")
    expected = state.expected_start if state is not None and stage.condition == "waits" else None
    return said + (f"; it may begin at {clock(expected)}" if expected and expected > time.time() else "")


def state_words(stages: Sequence[JobReport]) -> str:
    """What is said in place of `killed` of a run whose job waits in the queue; empty where none does."""
    trains = [stage for stage in stages if stage.record.kind == "train"]
    waiting = next((stage for stage in trains if stage.condition == "waits"), None)
    if waiting is None or any(stage.condition == "runs" for stage in trains):
        return ""
    why = f": {waiting.reason}" if waiting.reason else ""
    return f"job {waiting.record.job_id} waits in the queue{why}"


def failure_lines(run_folder: Path, attempts: Sequence[AttemptRecord]) -> list[tuple[str, str]]:
    """The last lines of what failed first, and where all of it stands."""
    found = find_first_failure(run_folder, attempts[-1].attempt if attempts else None)
    if found is None:
        return []
    return [("failed first", "\n".join([f"{found.who}; its last lines (all of it in {found.file}):", *found.lines]))]


def clock(seconds: float) -> str:
    """A moment as it is read here."""
    return datetime.fromtimestamp(seconds).astimezone().isoformat(sep=" ", timespec="seconds")
