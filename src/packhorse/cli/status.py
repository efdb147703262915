"""`packhorse status RUN`: state, progress and cost of a run. Imports no torch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from packhorse.cli.show.jobs import clock, failure_lines, job_lines, queue_words
from packhorse.cli.show.sweep import show_sweep
from packhorse.cli.show.text import open_console, pairs
from packhorse.errors import EXIT_OK
from packhorse.launching.local.outcome import describe_phase, newest_step
from packhorse.launching.slurm.job_reports import JobReport
from packhorse.plan.run_plan import RunPlan
from packhorse.run_folder.attempts import AttemptRecord, has_ended, lost_steps, made_steps, read_attempts
from packhorse.run_folder.folder import open_run, relative
from packhorse.run_folder.heartbeat import Heartbeat
from packhorse.run_folder.layout import METRICS_FILE
from packhorse.run_folder.metrics import read_metrics
from packhorse.run_folder.result import read_result
from packhorse.run_folder.status import Status, read_status
from packhorse.run_folder.sweep import find_sweep
from packhorse.track.meter import Figures
from packhorse.track.overfitting import overfitting
from packhorse.workflows.run_state import is_held, newest_heartbeats, ranks_live, read_stages

ELAPSED = "time/elapsed_seconds"


def status(run: str) -> int:
    """Show state, jobs, attempts and last metrics of a run; for a sweep, one line per run.

    Raises:
        UserError: There is no such run.
    """
    console = open_console()
    sweep = find_sweep(run)
    if sweep is not None:
        show_sweep(sweep, console)
    else:
        console.print(pairs(_lines(open_run(run))))
    return EXIT_OK


def _lines(plan: RunPlan) -> list[tuple[str, str]]:
    folder = Path(plan.run_folder)
    now = read_status(folder)
    stages, silent = read_stages(folder)
    attempts = read_attempts(folder)
    beats = newest_heartbeats(folder, attempts)
    runs = ranks_live(folder, attempts, beats)
    metrics = list(read_metrics(folder / METRICS_FILE))
    lines = [("run", relative(folder))]
    if now is not None:
        lines += _state(now, beats, runs or is_held(folder), stages)
    lines += job_lines(folder, stages, silent)
    if not runs and (
        any(stage.condition == "failed" for stage in stages) or (now is not None and now.state == "failed")
    ):
        lines += failure_lines(folder, attempts)
    checkpoint = newest_step(folder)
    lines += [("checkpoint", f"step {checkpoint:,} is the newest complete one" if checkpoint else "none yet")]
    result = read_result(folder)
    if result is not None:
        lines.append(("result", result.words))
    if signal := overfitting(metrics, plan.recipe.evaluation):
        lines.append(("overfitting", signal))
    if attempts:
        finished = now is not None and now.state == "finished"
        reached = max((beat.step for beat in beats), default=0) if runs or finished else checkpoint
        # The ranks of a job have no heartbeat before they start.
        starts = any(stage.record.kind == "train" and stage.condition == "runs" for stage in stages)
        live = runs or (starts and not has_ended(folder, attempts[-1].attempt))
        lines += [("attempts", _attempt(attempt, live and attempt is attempts[-1])) for attempt in attempts]
        lines += _lost(attempts, metrics, reached, time.time() if runs else attempts[-1].ended_at)
    latest: Figures = {}
    for line in metrics:
        latest |= line
    return lines + [(name, _figure(value)) for name, value in latest.items() if name != "step"]


def _state(now: Status, beats: Sequence[Heartbeat], runs: bool, stages: Sequence[JobReport]) -> list[tuple[str, str]]:
    state = now.state + (f": {now.message}" if now.message else "")
    if not runs and (queued := queue_words(stages)):
        state = f"{now.state}; {queued}"
    elif now.state in ("starting", "training") and not runs:
        last = max(beats, key=lambda beat: beat.at, default=None)
        since = f" at {clock(last.at)}, rank {last.rank} in {describe_phase(last)}" if last else ""
        state = f"killed{since}; `packhorse resume RUN` resumes it"
    lines = [("state", state)]
    if now.num_steps:
        lines.append(("progress", f"step {now.step:,} of {now.num_steps:,}, attempt {now.attempt}"))
    return [*lines, ("updated", f"{now.updated_at} by process {now.pid} on {now.host}")]


def _attempt(attempt: AttemptRecord, runs: bool) -> str:
    steps = f"{attempt.attempt}: steps {attempt.first_step:,} to {attempt.last_step:,}"
    if runs:
        return f"{steps}, runs since {clock(attempt.started_at)}"
    lines = attempt.message.splitlines()
    # No launcher of ours watched the ranks of a foreign job: their message may be a traceback.
    headline = lines[-1] if lines and lines[0].startswith("Traceback") else "".join(lines[:1])
    message = f": {headline}" if headline and attempt.message != attempt.outcome else ""
    return f"{steps} in {attempt.ended_at - attempt.started_at:,.0f} s, {attempt.outcome}{message}"


def _lost(
    attempts: Sequence[AttemptRecord], metrics: Sequence[Figures], reached: int, until: float
) -> list[tuple[str, str]]:
    """Return the steps that were lost or repeated, and the effective training time ratio (ETTR).

    The ratio of steps is the share of computed steps that the run kept. The ratio of time is the time in kept steps
    over the time since the first start ("effective training time", The Llama 3 Herd of Models, arXiv 2407.21783, 3.3.4;
    ETTR in ByteRobust, arXiv 2509.16293).
    """
    made, again = made_steps(attempts), lost_steps(attempts, reached)
    if made == 0:
        return []
    per_step = _mean(metrics, "speed/step_seconds")
    lines = [("lost", f"{again:,} of {made:,} steps were lost or repeated, about {again * per_step:,.0f} s")]
    wall = until - attempts[0].started_at
    effective = max((line[ELAPSED] for line in metrics if ELAPSED in line and line["step"] <= reached), default=0.0)
    of_time = f"; {effective / wall:.1%} of the {wall:,.0f} s since the first start, with pauses" if wall > 0 else ""
    return [*lines, ("ETTR", f"{1 - again / made:.1%} of the steps count{of_time} (effective training time ratio)")]


def _mean(metrics: Sequence[Figures], name: str) -> float:
    values = [line[name] for line in metrics if name in line]
    return sum(values) / len(values) if values else 0.0


def _figure(value: float) -> str:
    return f"{value:,.6g}" if isinstance(value, (int, float)) else str(value)
