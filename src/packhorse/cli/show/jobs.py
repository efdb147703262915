"""Lines about the jobs of a run: what each does, why one waits, why the rest do not run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from packhorse.launching.local.failure_logs import find_first_failure
from packhorse.launching.slurm.job_reports import JobReport
from packhorse.run_folder.attempts import AttemptRecord
from packhorse.run_folder.folder import relative
from packhorse.run_folder.layout import CANCEL_FILE

LABELS = {
    "waits": "waits",
    "done": "done",
    "failed": "did not end well",
    "not run": "does not run",
    "unknown": "unknown",
}


def job_lines(run_folder: Path, stages: Sequence[JobReport], silent: str) -> list[tuple[str, str]]:
    """Return one line per job, one for all replaced jobs, and the next command if a job failed.

    Args:
        run_folder: Folder of the run.
        stages: Jobs of the run.
        silent: Why Slurm does not answer; empty if it does.
    """
    current = [stage for stage in stages if stage.condition != "replaced"]
    replaced = [f"{stage.record.job_id} ({stage.record.kind})" for stage in stages if stage.condition == "replaced"]
    lines = [("jobs before", ", ".join(replaced))] if replaced else []
    lines += [("job", f"{stage.record.job_id} {stage.record.kind}: {words_of(stage)}") for stage in current]
    if silent:
        lines.append(("Slurm", f"the state of its jobs is not known: {silent}"))
    broken = any(stage.condition in ("failed", "not run") for stage in current)
    if broken and not any(stage.condition in ("waits", "runs") for stage in current):
        first = "it was cancelled" if (run_folder / CANCEL_FILE).exists() else "fix what failed"
        lines.append(("next", f"{first}; `packhorse resume {relative(run_folder)}` resumes from there"))
    return lines


def words_of(stage: JobReport) -> str:
    """Return what a job does, in words."""
    state = stage.state
    if stage.condition == "runs" and state is not None:
        again = f", queued again {state.restarts} time{'s' * (state.restarts > 1)}" if state.restarts else ""
        since = f" since {clock(state.expected_start)}" if state.expected_start else ""
        limit = f", time limit {state.time_limit}" if state.time_limit else ""
        ends = "" if state.state == "RUNNING" else f" ({state.state})"
        return f"runs{ends} on {state.nodes}{since}{limit}{again}"
    words = LABELS[stage.condition] + (f": {stage.reason}" if stage.reason else "")
    expected = state.expected_start if state is not None and stage.condition == "waits" else None
    return words + (f"; it may start at {clock(expected)}" if expected and expected > time.time() else "")


def queue_words(stages: Sequence[JobReport]) -> str:
    """Return which training job waits in the queue, and why; empty if none waits or one runs."""
    trains = [stage for stage in stages if stage.record.kind == "train"]
    waiting = next((stage for stage in trains if stage.condition == "waits"), None)
    if waiting is None or any(stage.condition == "runs" for stage in trains):
        return ""
    why = f": {waiting.reason}" if waiting.reason else ""
    return f"job {waiting.record.job_id} waits in the queue{why}"


def failure_lines(run_folder: Path, attempts: Sequence[AttemptRecord]) -> list[tuple[str, str]]:
    """Return the last lines of the process that failed first, and the file with all of its lines."""
    failure = find_first_failure(run_folder, attempts[-1].attempt if attempts else None)
    if failure is None:
        return []
    return [
        ("failed first", "\n".join([f"{failure.who}; its last lines (all of it in {failure.file}):", *failure.lines]))
    ]


def clock(seconds: float) -> str:
    """Return a moment as local date and time."""
    return datetime.fromtimestamp(seconds).astimezone().isoformat(sep=" ", timespec="seconds")
