"""Memory, time and possible changes of a plan, for a terminal of 80 columns or more."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

from rich.table import Table
from rich.text import Text

from packhorse.cli.show.text import plain_table
from packhorse.durable import size
from packhorse.estimate.evaluation import estimate_evaluation
from packhorse.estimate.plan_estimate import MARGIN, PlanEstimate
from packhorse.estimate.search.auto import LeastHardware
from packhorse.estimate.search.candidates import Candidate, host_memory_text, rejection_reason
from packhorse.estimate.search.changes import Change
from packhorse.estimate.search.scaling import Scaling
from packhorse.estimate.teacher import TeacherEstimate
from packhorse.estimate.training_state import Component, total_bytes

GIB = 2**30
BAR_CELLS = 40
CHECKPOINTING = {False: "no", 4: "1 in 4", 3: "1 in 3", 2: "1 in 2", "selective": "select.", True: "all"}
"""Value of `parallel.checkpointing` -> which layers are recomputed."""


def verdict_lines(case: PlanEstimate, now: datetime) -> list[tuple[str, str]]:
    """Return whether the plan fits, the time of run and evaluation, and the cost if the price is known.

    Args:
        case: Plan with its estimates.
        now: Start of the run, from which its end is counted.
    """
    speed = case.speed
    lines = [("memory", verdict_words(case)), ("run time", _run(case, now))]
    if speed.price is not None:
        lines.append(("cost", f"{speed.price:,.2f} at {speed.price_per_gpu_hour:,.2f} per GPU hour"))
    return [*lines, ("evaluation", evaluation_words(case))]


def evaluation_words(case: PlanEstimate) -> str:
    """Return on how many GPUs `packhorse evaluate` runs, in how much memory, and how long."""
    found, card = estimate_evaluation(case), case.basis.gpu
    gpus = "1 GPU" if found.ranks == 1 else f"{found.ranks} GPUs of one node, {found.engine}"
    memory = f"{found.required_bytes / GIB:.1f} of {card.memory_bytes / GIB:.1f} GiB"
    if not found.fits:
        return f"does not fit {gpus}: {memory}; serve the model, and use packhorse evaluate --endpoint"
    time = "known when the data is prepared"
    if found.seconds is not None and found.tokens is not None:
        work = f"{found.tokens:,} tokens and {found.answered_rows:,} answers of 2 models"
        time = f"about {_seconds(found.seconds)} without loading, for {work}"
    return f"{gpus}: {memory}; {time}"


def verdict_words(case: PlanEstimate) -> str:
    """Return whether the plan fits, with both figures."""
    card = case.basis.gpu
    figures = f"{case.required_bytes / GIB:.1f} of {card.memory_bytes / GIB:.1f} GiB of {card.name}"
    if case.margin < 0:
        return f"does not fit: {figures}, {-case.margin * card.memory_bytes / GIB:.1f} GiB too much"
    if not case.host_fits:
        return f"fits the GPU, {figures}; does not fit the host: {host_memory_text(case)}"
    if not case.is_comfortable:
        return f"fits, but tightly: {figures}, {case.margin:.0%} free; {MARGIN:.0%} or more is safe"
    return f"fits: {figures}, {case.margin:.0%} free"


def phase_table(case: PlanEstimate) -> Table:
    """Return a table with one bar per phase; a full bar is the memory of the GPU."""
    outside = total_bytes(case.memory.outside)
    bar = f"0 to {case.basis.gpu.memory_bytes / GIB:.1f} GiB"
    table = plain_table("phase", bar, "GiB", "", right=("GiB",), whole=(bar,))
    for phase in case.memory.phases:
        filled = (phase.bytes + outside) / case.basis.gpu.memory_bytes
        mark = "fullest" if phase == case.memory.peak else ""
        style = "red" if filled > 1 else "yellow" if filled > 1 - MARGIN else "green"
        table.add_row(phase.name, Text(_bar(filled), style=style), f"{(phase.bytes + outside) / GIB:.1f}", mark)
    return table


def _bar(filled: float) -> str:
    cells = min(BAR_CELLS, round(filled * BAR_CELLS))
    return "█" * cells + "░" * (BAR_CELLS - cells) + (">" if filled > 1 else "")


def component_table(case: PlanEstimate) -> Table:
    """Return the components of the fullest phase, the largest first."""
    table = plain_table(f"in {case.memory.peak.name}", "GiB", "why", right=("GiB",))
    parts = sorted(case.memory.peak.components, key=lambda part: -part.bytes)
    for part in (*parts, *case.memory.outside):
        table.add_row(part.name, f"{part.bytes / GIB:.2f}", Text(part.reason))
    return table


def storage_lines(case: PlanEstimate) -> list[tuple[str, str]]:
    """Return host memory of a node, disk, and local disk if it is used."""
    storage = case.storage
    lines = [
        ("host", f"{host_memory_text(case)}: {_parts(storage.host)}"),
        ("disk", f"{size(total_bytes(storage.disk))}: {_parts(storage.disk)}"),
    ]
    if storage.local_disk:
        lines.append(
            ("local disk", f"{size(total_bytes(storage.local_disk))} on each node: {_parts(storage.local_disk)}")
        )
    return lines


def _parts(parts: Sequence[Component]) -> str:
    return ", ".join(f"{part.name} {size(part.bytes)}" for part in parts)


def time_lines(case: PlanEstimate) -> list[tuple[str, str]]:
    """Return step time, speed, and the uncertainty of all times."""
    speed = case.speed
    largest = sorted(speed.parts, key=lambda part: -part.seconds)[:4]
    shares = ", ".join(f"{part.name} {part.seconds / speed.step_seconds:.0%}" for part in largest)
    return [
        *([("teacher", _teacher(case.teacher, speed.before_seconds))] if case.teacher is not None else []),
        ("step time", f"{_seconds(speed.step_seconds)}: {shares}"),
        (
            "speed",
            f"{speed.tokens_per_second_per_gpu:,.0f} tokens/s per GPU,"
            f" {speed.tokens_per_second_per_gpu * speed.world_size:,.0f} in total; MFU {speed.mfu:.1%},"
            f" HFU {speed.hfu:.1%}; {speed.model_flops:.2e} FLOPs per step",
        ),
        ("uncertainty", f"± {speed.uncertainty:.0%}: {speed.uncertainty_reason}"),
    ]


def _teacher(teacher: TeacherEstimate, seconds: float) -> str:
    memory = f"{teacher.memory.bytes / GIB:.1f} GiB"
    if teacher.is_resident:
        return f"beside the student in every step: {teacher.pass_seconds:.2f} s for each micro-batch, {memory}"
    time = "its time is known when the data is prepared" if teacher.num_passes is None else _seconds(seconds)
    return f"one forward pass over the data before the first step, once for all runs on it: {time}, {memory}"


def _run(case: PlanEstimate, now: datetime) -> str:
    speed = case.speed
    if speed.hours is None or speed.energy_kwh is None:
        return "known when the data is prepared: packhorse prepare"
    ready = now + timedelta(hours=speed.hours)
    about = "about " * (case.plan.num_steps is None)
    before = f", {_seconds(speed.before_seconds)} of them before step 1" if speed.before_seconds else ""
    return (
        f"{about}{_seconds(speed.hours * 3600)} for {about}{speed.num_steps:,} steps{before}, without evaluations and"
        f" checkpoints; started now, it ends {ready:%d %b %H:%M}; {speed.energy_kwh:,.1f} kWh at most"
    )


def _seconds(seconds: float) -> str:
    if seconds >= 2 * 86400:
        return f"{seconds / 86400:.1f} days"
    if seconds >= 2 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 120 else f"{seconds:.2f} s"


def change_table(changes: Sequence[Change]) -> Table:
    """Return a table with one row per change that makes the run fit."""
    figures = ("GiB", "tokens/s\nper GPU")
    table = plain_table("change that fits", *figures, "", right=figures)
    table.columns[0].min_width = len("parallel.engine=zero3_offload")
    for change in changes:
        speed = f"{change.case.speed.tokens_per_second_per_gpu:,.0f} ({1 / (1 + change.slower) - 1:+.0%})"
        table.add_row(change.words, f"{change.case.required_bytes / GIB:.1f}", speed, change.result)
    return table


def ways_table(candidates: Sequence[Candidate], winner: Candidate) -> Table:
    """Return a table of configurations: the best, those that fit, those that do not fit, those that are refused."""
    figures = ("micro", "check-\npointing", "GiB", "s per\nstep", "tokens/s\nper GPU")
    table = plain_table("engine", *figures, "verdict", right=figures, whole=("engine",))
    for way in sorted(candidates, key=lambda way: _rank(way, winner)):
        if way.case is None:
            micro = "" if way.micro is None else str(way.micro)
            table.add_row(way.engine, micro, "", "", "", "", Text(rejection_reason(way, winner), style="dim"))
            continue
        speed = way.case.speed
        cells = (
            str(way.micro),
            CHECKPOINTING[way.checkpointing],
            f"{way.case.required_bytes / GIB:.1f}",
            f"{speed.step_seconds:.2f}",
            f"{speed.tokens_per_second_per_gpu:,.0f}",
        )
        best = "best" if way.case.fits else "needs the least memory; none fits"
        verdict = rejection_reason(way, winner) or best
        table.add_row(way.engine, *cells, Text(verdict, style="bold" if way == winner else ""))
    return table


def _rank(way: Candidate, winner: Candidate) -> tuple[int, float]:
    if way == winner:
        return 0, 0.0
    if way.case is None:
        return 3, 0.0
    return (1, way.case.step_seconds) if way.case.fits else (2, float(way.case.required_bytes))


def least_table(results: Sequence[LeastHardware]) -> Table:
    """Return a table with the fewest GPUs of each kind."""
    figures = ("GiB", "of", "tokens/s in total", "run")
    table = plain_table("GPUs", "with", *figures, right=figures, whole=("GPUs",))
    for least in results:
        if least.way is None or least.way.case is None:
            table.add_row(least.gpu.name, Text(least.refused or "too small, however many", style="dim"))
            continue
        case, way = least.way.case, least.way
        speed = case.speed
        settings = f"{way.engine}, batch.micro {way.micro}" + ", checkpointing" * bool(way.checkpointing)
        run = _seconds(speed.hours * 3600) if speed.hours is not None else "unknown"
        price = f", {speed.price:,.2f}" if speed.price is not None else ""
        rate = f"{speed.tokens_per_second_per_gpu * speed.world_size:,.0f}"
        memory = (f"{case.required_bytes / GIB:.1f}", f"{least.gpu.memory_bytes / GIB:.1f}")
        table.add_row(f"{least.count}x{least.gpu.name}", settings, *memory, rate, run + price)
    return table


def scaling_table(scaling: Scaling, card_bytes: int) -> Table:
    """Return a table with one row per number of GPUs that can share the packs.

    Args:
        scaling: Weak or strong scaling.
        card_bytes: Memory of one GPU.
    """
    speeds = ("s per\nstep", "tokens/s\nper GPU", "in total", "effi-\nciency", "waiting")
    headings = ("GPUs", "packs\nper step", *speeds, "GiB")
    table = plain_table(*headings, "", right=headings)
    for point in scaling.points:
        if point.estimate is not None:
            speed = point.estimate
            figures = (f"{speed.step_seconds:.2f}", f"{speed.tokens_per_second_per_gpu:,.0f}")
            shares = (f"{point.efficiency:.0%}", f"{point.waiting:.0%}", f"{point.required_bytes / GIB:.1f}")
            fits = "does not fit" if point.required_bytes > card_bytes else ""
            table.add_row(
                f"{point.gpus:,}", f"{point.packs:,}", *figures, f"{point.tokens_per_second:,.0f}", *shares, fits
            )
    return table


def stop_words(scaling: Scaling) -> str:
    """Return what limits the scaling, and at how many GPUs."""
    if scaling.stopped_at is None:
        return scaling.reason
    return f"stopped at {scaling.stopped_at:,} GPUs by {scaling.stopped_by}: {scaling.reason}"
