"""`packhorse status` of a sweep: a line for each run, with what sets it apart and how far it came."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from packhorse.commands.status_jobs import LABELS, stages_of_run, words_of
from packhorse.launching.slurm.client import NoSlurmError, SlurmError
from packhorse.launching.slurm.job_reports import JobReport, JobsWithStates, jobs_of_runs
from packhorse.run_folder.folder import relative
from packhorse.run_folder.jobs import read_jobs
from packhorse.run_folder.layout import METRICS_FILE
from packhorse.run_folder.metrics import read_metrics
from packhorse.run_folder.status import read_status
from packhorse.run_folder.sweep import SweepMember, member_folder, read_sweep

LOSS, HELD_OUT = "train/loss", "evaluation/loss"


@dataclass(frozen=True)
class Line:
    """One run of a sweep.

    Attributes:
        member: Its number and what sets it apart.
        state: Of the run, or of its job where that says more.
        progress: `step 20 of 100`; empty before it has begun.
        loss: Of its last step; NaN before the first.
        held_out: The lowest on its validation rows; NaN where none was measured.
    """

    member: SweepMember
    state: str
    progress: str
    loss: float
    held_out: float


def show_sweep(folder: Path, console: Console) -> None:
    """Prints the table, the best run first named, and what to do where runs did not end well."""
    members, silent = read_sweep(folder).runs, ""
    jobs: Mapping[Path, JobsWithStates] = {}
    try:
        jobs = jobs_of_runs(folder)
    except (NoSlurmError, SlurmError) as error:
        silent = error.mistakes[0].fact
        runs = [member_folder(folder, member.number) for member in members]
        jobs = {run: [(record, None) for record in read_jobs(run)] for run in runs}
    lines = [line_of(folder, member, jobs, asked=not silent) for member in members]
    console.print(f"sweep {relative(folder)}, {len(lines)} runs", highlight=False, soft_wrap=True)
    console.print(sweep_table(folder.name, lines))
    if silent:
        console.print(f"what its jobs do now is not known: {silent}", highlight=False, soft_wrap=True, markup=False)
    best = best_of(lines)
    if best is not None:
        name = relative(member_folder(folder, best.member.number))
        console.print(f"lowest {HELD_OUT}: {name}, {best.held_out:.4g}", highlight=False, soft_wrap=True, markup=False)


def line_of(folder: Path, member: SweepMember, jobs: Mapping[Path, JobsWithStates], asked: bool) -> Line:
    """Where one run stands.

    Args:
        folder: Of the sweep.
        member: The run.
        jobs: Of all its runs.
        asked: Slurm was asked.
    """
    run = member_folder(folder, member.number)
    now = read_status(run)
    stages = stages_of_run(run, jobs[run], asked)
    figures = list(read_metrics(run / METRICS_FILE))
    losses = [line[LOSS] for line in figures if LOSS in line]
    held_out = [line[HELD_OUT] for line in figures if HELD_OUT in line]
    begun = now is not None and now.attempt > 0
    return Line(
        member=member,
        state=_state(now.state if now is not None else "its folder is gone", stages),
        progress=f"step {now.step:,} of {now.num_steps:,}" if now is not None and begun else "",
        loss=losses[-1] if losses else math.nan,
        held_out=min(held_out, default=math.nan),
    )


def sweep_table(name: str, lines: Sequence[Line]) -> Table:
    """A row for each run; the best on validation rows is marked."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("run", "set apart by", "state", "progress", LOSS, f"lowest {HELD_OUT}"):
        table.add_column(heading, overflow="fold")
    best = best_of(lines)
    for line in lines:
        mark = " *" if line is best else ""
        cells = (
            f"{name}-{line.member.number}",
            " ".join(line.member.overrides),
            line.state,
            line.progress,
            _number(line.loss),
            _number(line.held_out) + mark,
        )
        table.add_row(*map(Text, cells))
    return table


def best_of(lines: Sequence[Line]) -> Line | None:
    """The run with the lowest loss on validation rows; None where none was measured."""
    return min((line for line in lines if math.isfinite(line.held_out)), key=lambda line: line.held_out, default=None)


def _state(state: str, stages: Sequence[JobReport]) -> str:
    train = next((stage for stage in reversed(stages) if stage.record.kind == "train"), None)
    if train is None or state == "finished" or train.condition in ("runs", "done", "replaced"):
        return state
    return words_of(train) if train.condition in LABELS else state


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else ""
