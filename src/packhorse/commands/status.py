"""`packhorse status RUN`: where a run stands, what its attempts cost, and what was lost; imports no torch."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from packhorse.commands.lines import pairs
from packhorse.commands.status_jobs import clock, failure_lines, job_lines, read_stages, state_words
from packhorse.commands.status_sweep import show_sweep
from packhorse.errors import EXIT_OK
from packhorse.launching.local.outcome import describe_phase, newest_step
from packhorse.launching.slurm.job_reports import JobReport
from packhorse.run_folder.attempts import AttemptRecord, has_ended, lost_steps, made_steps, read_attempts
from packhorse.run_folder.folder import open_run, relative
from packhorse.run_folder.heartbeat import Heartbeat, find_process, read_heartbeats
from packhorse.run_folder.layout import ATTEMPT_FOLDERS, LOGS_FOLDER, METRICS_FILE, numbered
from packhorse.run_folder.lock import lock_holder
from packhorse.run_folder.metrics import read_metrics
from packhorse.run_folder.status import Status, read_status
from packhorse.run_folder.sweep import find_sweep
from packhorse.track.meter import Figures

LIVES_SECONDS = 60.0
"""A rank on another host lives if its heartbeat is not older."""
ELAPSED = "time/elapsed_seconds"


def status(run: str) -> int:
    """Shows a run's state, its jobs, its attempts and its last figures; of a sweep a line a run.

    Raises:
        UserError: There is no such run.
    """
    console = Console()
    sweep = find_sweep(run)
    if sweep is not None:
        show_sweep(sweep, console)
        return EXIT_OK
    folder = Path(open_run(run).run_folder)
    now = read_status(folder)
    stages, silent = read_stages(folder)
    attempts = read_attempts(folder)
    beats = read_heartbeats(folder / LOGS_FOLDER / numbered(ATTEMPT_FOLDERS, attempts[-1].attempt)) if attempts else []
    runs = _ranks_live(folder, attempts, beats)
    figures = list(read_metrics(folder / METRICS_FILE))
    lines = [("run", relative(folder))]
    if now is not None:
        lines += _state(now, beats, runs or _is_held(folder), stages)
    lines += job_lines(folder, stages, silent)
    if not runs and (
        any(stage.condition == "failed" for stage in stages) or (now is not None and now.state == "failed")
    ):
        lines += failure_lines(folder, attempts)
    checkpoint = newest_step(folder)
    lines += [("checkpoint", f"step {checkpoint:,} is the newest complete one" if checkpoint else "none yet")]
    if attempts:
        finished = now is not None and now.state == "finished"
        reached = max((beat.step for beat in beats), default=0) if runs or finished else checkpoint
        # A job's ranks have no heartbeat before they begin.
        begins = any(stage.record.kind == "train" and stage.condition == "runs" for stage in stages)
        live = runs or (begins and not has_ended(folder, attempts[-1].attempt))
        lines += [("attempts", _attempt(attempt, live and attempt is attempts[-1])) for attempt in attempts]
        lines += _lost(attempts, figures, reached, time.time() if runs else attempts[-1].ended_at)
    latest: Figures = {}
    for line in figures:
        latest |= line
    lines += [(name, _figure(value)) for name, value in latest.items() if name != "step"]
    console.print(pairs(lines))
    return EXIT_OK


def is_under_way(folder: Path) -> bool:
    """Whether a rank or a launcher of the run lives, or a job of it waits or runs."""
    attempts = read_attempts(folder)
    beats = read_heartbeats(folder / LOGS_FOLDER / numbered(ATTEMPT_FOLDERS, attempts[-1].attempt)) if attempts else []
    stages, _ = read_stages(folder)
    return (
        _ranks_live(folder, attempts, beats)
        or _is_held(folder)
        or any(stage.condition in ("waits", "runs") for stage in stages)
    )


def _state(now: Status, beats: Sequence[Heartbeat], runs: bool, stages: Sequence[JobReport]) -> list[tuple[str, str]]:
    state_text = now.state + (f": {now.message}" if now.message else "")
    if not runs and (queued := state_words(stages)):
        state_text = f"{now.state}; {queued}"
    elif now.state in ("starting", "training") and not runs:
        last = max(beats, key=lambda beat: beat.at, default=None)
        since = f" at {clock(last.at)}, rank {last.rank} in {describe_phase(last)}" if last else ""
        state_text = f"ended without a word (killed){since}; `packhorse resume RUN` goes on"
    lines = [("state", state_text)]
    if now.num_steps:
        lines.append(("progress", f"step {now.step:,} of {now.num_steps:,}, attempt {now.attempt}"))
    return [*lines, ("updated", f"{now.updated_at} by process {now.pid} on {now.host}")]


def _ranks_live(folder: Path, attempts: Sequence[AttemptRecord], beats: Sequence[Heartbeat]) -> bool:
    return any(map(_lives, beats)) and not has_ended(folder, attempts[-1].attempt)


def _lives(beat: Heartbeat) -> bool:
    if beat.phase == "end":
        return False
    if beat.host == socket.gethostname():
        return find_process(beat.pid) is not None
    return time.time() - beat.at < LIVES_SECONDS


def _is_held(folder: Path) -> bool:
    """Whether a launcher runs it, between two attempts for example."""
    found = lock_holder(folder)
    if found is None or "job" in found:  # of a job, Slurm and the heartbeats tell whether it lives
        return False
    return found["host"] != socket.gethostname() or find_process(int(str(found["pid"]))) is not None


def _attempt(attempt: AttemptRecord, runs: bool) -> str:
    steps = f"{attempt.attempt}: steps {attempt.first_step:,} to {attempt.last_step:,}"
    if runs:
        return f"{steps}, runs since {clock(attempt.started_at)}"
    lines = attempt.message.splitlines()
    # Of an attempt that no launcher of ours watched, what its rank left may be a traceback.
    headline = lines[-1] if lines and lines[0].startswith("Traceback") else "".join(lines[:1])
    said = f": {headline}" if headline and attempt.message != attempt.outcome else ""
    return f"{steps} in {attempt.ended_at - attempt.started_at:,.0f} s, {attempt.outcome}{said}"


def _lost(
    attempts: Sequence[AttemptRecord], figures: Sequence[Figures], reached: int, until: float
) -> list[tuple[str, str]]:
    """What was made more than once, and the effective training time ratio (ETTR).

    The share of what was spent that counts: of the steps made, those that the run stands on; of the time since its
    first start, the time in them ("effective training time", The Llama 3 Herd of Models, arXiv 2407.21783, 3.3.4;
    ETTR in ByteRobust, arXiv 2509.16293).
    """
    made, again = made_steps(attempts), lost_steps(attempts, reached)
    if made == 0:
        return []
    per_step = _mean(figures, "speed/step_seconds")
    lines = [("lost", f"{again:,} of {made:,} steps were made in vain or twice, about {again * per_step:,.0f} s")]
    wall = until - attempts[0].started_at
    effective = max((line[ELAPSED] for line in figures if ELAPSED in line and line["step"] <= reached), default=0.0)
    of_time = f"; {effective / wall:.1%} of the {wall:,.0f} s since the first start, pauses too" if wall > 0 else ""
    return [*lines, ("ETTR", f"{1 - again / made:.1%} of the steps count{of_time} (effective training time ratio)")]


def _mean(figures: Sequence[Figures], name: str) -> float:
    values = [line[name] for line in figures if name in line]
    return sum(values) / len(values) if values else 0.0


def _figure(value: float) -> str:
    return f"{value:,.6g}" if isinstance(value, (int, float)) else str(value)
