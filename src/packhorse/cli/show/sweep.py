"""`packhorse status` of a sweep: one line per run, with what distinguishes it and its progress."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from packhorse.cli.show.jobs import LABELS, words_of
from packhorse.cli.show.text import plain_table, print_plain
from packhorse.launching.slurm.client import NoSlurmError, SlurmError
from packhorse.launching.slurm.job_reports import JobReport, JobsWithStates, jobs_of_runs
from packhorse.run_folder.folder import relative
from packhorse.run_folder.jobs import read_jobs
from packhorse.run_folder.layout import METRICS_FILE
from packhorse.run_folder.metrics import read_metrics
from packhorse.run_folder.status import read_status
from packhorse.run_folder.sweep import SweepMember, member_folders, read_sweep
from packhorse.workflows.run_state import stages_of_run

NOT_STARTED: Final = "not started"
LOSS, HELD_OUT = "train/loss", "evaluation/loss"


@dataclass(frozen=True)
class RunLine:
    """One run of a sweep.

    Attributes:
        member: Number and overrides of the run.
        state: State of the run, or of its job if that says more.
        progress: `step 20 of 100`; empty before the first step.
        loss: Loss of the last step; NaN before the first.
        held_out: Lowest loss on the validation rows; NaN if none was measured.
    """

    member: SweepMember
    state: str
    progress: str
    loss: float
    held_out: float


def show_sweep(folder: Path, console: Console) -> None:
    """Print the table of a sweep and its best run."""
    members, silent = read_sweep(folder).runs, ""
    jobs: Mapping[Path, JobsWithStates] = {}
    try:
        jobs = jobs_of_runs(folder)
    except (NoSlurmError, SlurmError) as error:
        silent = error.mistakes[0].fact
        runs = member_folders(folder)
        jobs = {run: [(record, None) for record in read_jobs(run)] for run in runs}
    lines = [line_of(folder, member, jobs, asked=not silent) for member in members]
    print_plain(f"sweep {relative(folder)}, {len(lines)} runs", console)
    console.print(sweep_table(lines))
    if silent:
        print_plain(f"the state of its jobs is not known: {silent}", console)
    best = best_of(lines)
    if best is not None:
        name = relative(folder.with_name(best.member.name))
        print_plain(f"lowest {HELD_OUT}: {name}, {best.held_out:.4g}", console)


def line_of(folder: Path, member: SweepMember, jobs: Mapping[Path, JobsWithStates], asked: bool) -> RunLine:
    """Return the line of one run.

    Args:
        folder: Folder of the sweep.
        member: The run.
        jobs: Jobs of all runs of the sweep.
        asked: Whether Slurm has answered.
    """
    run = folder.with_name(member.name)
    status = read_status(run)
    stages = stages_of_run(run, jobs[run], asked)
    metrics = list(read_metrics(run / METRICS_FILE))
    losses = [line[LOSS] for line in metrics if LOSS in line]
    held_out = [line[HELD_OUT] for line in metrics if HELD_OUT in line]
    has_begun = status is not None and status.attempt > 0
    return RunLine(
        member=member,
        state=_state(status.state if status is not None else NOT_STARTED, stages),
        progress=f"step {status.step:,} of {status.num_steps:,}" if status is not None and has_begun else "",
        loss=losses[-1] if losses else math.nan,
        held_out=min(held_out, default=math.nan),
    )


def sweep_table(lines: Sequence[RunLine]) -> Table:
    """Return a table with one row per run; a star marks the lowest loss on validation rows."""
    table = plain_table("run", "overrides", "state", "progress", LOSS, f"lowest {HELD_OUT}")
    best = best_of(lines)
    for line in lines:
        cells = (
            line.member.name,
            " ".join(line.member.overrides),
            line.state,
            line.progress,
            _number(line.loss),
            _number(line.held_out) + (" *" if line is best else ""),
        )
        table.add_row(*map(Text, cells))
    return table


def best_of(lines: Sequence[RunLine]) -> RunLine | None:
    """Return the run with the lowest loss on validation rows; None if none was measured."""
    return min((line for line in lines if math.isfinite(line.held_out)), key=lambda line: line.held_out, default=None)


def _state(state: str, stages: Sequence[JobReport]) -> str:
    train = next((stage for stage in reversed(stages) if stage.record.kind == "train"), None)
    if train is None or state == "finished" or train.condition in ("runs", "done", "replaced"):
        return state
    return words_of(train) if train.condition in LABELS else state


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else ""
