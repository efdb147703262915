"""Memory, time and what to change, for a terminal of 80 columns or more."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

from rich.table import Table
from rich.text import Text

from packhorse.durable import size
from packhorse.estimate.memory import Phase
from packhorse.estimate.plan_estimate import MARGIN, PlanEstimate
from packhorse.estimate.search.auto import LeastHardware
from packhorse.estimate.search.candidates import Candidate, host_memory_text, rejection_reason
from packhorse.estimate.search.changes import Change
from packhorse.estimate.search.scaling import Scaling
from packhorse.estimate.training_state import Component

GIB = 2**30
BAR_CELLS = 40


def verdict_words(case: PlanEstimate) -> str:
    """Whether it fits, with both figures."""
    card = case.basis.gpu
    figures = f"{case.required_bytes / GIB:.1f} of {card.memory_bytes / GIB:.1f} GiB of {card.name}"
    if case.margin < 0:
        return f"does not fit: {figures}, {-case.margin * card.memory_bytes / GIB:.1f} GiB too much"
    if not case.host_fits:
        return f"fits the GPU, {figures}; does not fit the host: {host_memory_text(case)}"
    if not case.is_comfortable:
        return f"fits, but tightly: {figures}, {case.margin:.0%} to spare; {MARGIN:.0%} and more are safe"
    return f"fits: {figures}, {case.margin:.0%} to spare"


def phase_table(case: PlanEstimate) -> Table:
    """A bar for each phase against the card, whose end is the bar's."""
    outside = sum(part.bytes for part in case.memory.outside)
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("phase")
    table.add_column(f"0 to {case.basis.gpu.memory_bytes / GIB:.1f} GiB", no_wrap=True)
    table.add_column("GiB", justify="right")
    table.add_column("")
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
    """What the fullest phase is made of; the largest first."""
    peak: Phase = case.memory.peak
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column(f"in {peak.name}")
    table.add_column("GiB", justify="right")
    table.add_column("why", overflow="fold")
    parts = sorted(peak.components, key=lambda part: -part.bytes)
    for part in (*parts, *case.memory.outside):
        table.add_row(part.name, f"{part.bytes / GIB:.2f}", Text(part.reason))
    return table


def storage_lines(case: PlanEstimate) -> list[tuple[str, str]]:
    """Host memory of a node, disk, and the local disk where there is any."""
    storage = case.storage
    lines = [
        ("host", f"{host_memory_text(case)}: {_parts(storage.host)}"),
        ("disk", f"{_in_all(storage.disk)}: {_parts(storage.disk)}"),
    ]
    if storage.local_disk:
        lines.append(("local disk", f"{_in_all(storage.local_disk)} on each node: {_parts(storage.local_disk)}"))
    return lines


def _in_all(parts: Sequence[Component]) -> str:
    return size(sum(part.bytes for part in parts))


def _parts(parts: Sequence[Component]) -> str:
    return ", ".join(f"{part.name} {size(part.bytes)}" for part in parts)


def time_lines(case: PlanEstimate, now: datetime) -> list[tuple[str, str]]:
    """A step, speed, the whole run, and how sure that is.

    Args:
        case: Its speed.
        now: From when the run would end is counted.
    """
    speed = case.speed
    largest = sorted(speed.parts, key=lambda part: -part.seconds)[:4]
    shares = ", ".join(f"{part.name} {part.seconds / speed.step_seconds:.0%}" for part in largest)
    return [
        ("step time", f"{_seconds(speed.step_seconds)}: {shares}"),
        (
            "speed",
            f"{speed.tokens_per_second_per_gpu:,.0f} tokens/s a GPU,"
            f" {speed.tokens_per_second_per_gpu * speed.world_size:,.0f} in all; MFU {speed.mfu:.1%},"
            f" HFU {speed.hfu:.1%}; {speed.model_flops:.2e} FLOPs a step",
        ),
        ("run time", _run(case, now)),
        ("sure to", f"± {speed.uncertainty:.0%}: {speed.uncertainty_reason}"),
    ]


def _run(case: PlanEstimate, now: datetime) -> str:
    speed = case.speed
    if speed.hours is None or speed.energy_kwh is None:
        return "known when the packs are counted: packhorse prepare"
    ready = now + timedelta(hours=speed.hours)
    about = "about " * (case.plan.num_steps is None)
    said = (
        f"{about}{_seconds(speed.hours * 3600)} for {about}{speed.num_steps:,} steps, without evaluations and"
        f" checkpoints; started now, done {ready:%d %b %H:%M}; {speed.energy_kwh:,.1f} kWh at most"
    )
    if speed.price is not None:
        said += f"; {speed.price:,.2f} at {speed.price_per_gpu_hour:,.2f} a GPU hour"
    return said


def _seconds(seconds: float) -> str:
    if seconds >= 2 * 86400:
        return f"{seconds / 86400:.1f} days"
    if seconds >= 2 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 120 else f"{seconds:.2f} s"


def change_table(changes: Sequence[Change]) -> Table:
    """A line for each change that makes the run fit."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("would fit with", overflow="fold", min_width=len("parallel.engine=zero3_offload"))
    table.add_column("GiB", justify="right", no_wrap=True)
    table.add_column("tokens/s\na GPU", justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for change in changes:
        speed = f"{change.case.speed.tokens_per_second_per_gpu:,.0f} ({1 / (1 + change.slower) - 1:+.0%})"
        table.add_row(change.words, f"{change.case.required_bytes / GIB:.1f}", speed, change.result)
    return table


def ways_table(found: Sequence[Candidate], winner: Candidate) -> Table:
    """Every way, the best first; those that do not fit behind those that do, what is refused at the end."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("engine", no_wrap=True)
    for heading in ("micro", "check-\npointing", "GiB", "s a\nstep", "tokens/s\na GPU"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict", overflow="fold")
    for way in sorted(found, key=lambda way: _rank(way, winner)):
        if way.case is None:
            micro = "" if way.micro is None else str(way.micro)
            table.add_row(way.engine, micro, "", "", "", "", Text(rejection_reason(way, winner), style="dim"))
            continue
        speed = way.case.speed
        cells = (
            str(way.micro),
            "yes" if way.checkpointing else "no",
            f"{way.case.required_bytes / GIB:.1f}",
            f"{speed.step_seconds:.2f}",
            f"{speed.tokens_per_second_per_gpu:,.0f}",
        )
        best = "the one to take" if way.case.fits else "needs least; none fits"
        said = rejection_reason(way, winner) or best
        table.add_row(way.engine, *cells, Text(said, style="bold" if way == winner else ""))
    return table


def _rank(way: Candidate, winner: Candidate) -> tuple[int, float]:
    if way == winner:
        return 0, 0.0
    if way.case is None:
        return 3, 0.0
    return (1, way.case.step_seconds) if way.case.fits else (2, float(way.case.required_bytes))


def least_table(found: Sequence[LeastHardware]) -> Table:
    """The fewest GPUs of each kind."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("GPUs", no_wrap=True)
    table.add_column("with", overflow="fold")
    for heading in ("GiB", "of", "tokens/s in all", "run"):
        table.add_column(heading, justify="right", no_wrap=True)
    for least in found:
        if least.way is None or least.way.case is None:
            table.add_row(least.gpu.name, Text(least.refused or "too small in any number", style="dim"))
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
    """A line for each number of GPUs that can share the packs; those that are too few for the model are told.

    Args:
        scaling: Weak or strong.
        card_bytes: Memory of one GPU.
    """
    table = Table(box=None, pad_edge=False, header_style="dim")
    headings = ("GPUs", "packs\na step", "s a\nstep", "tokens/s\na GPU", "in all", "effi-\nciency", "waiting", "GiB")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
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
    """What stops it, and at how many GPUs."""
    if scaling.stopped_at is None:
        return scaling.reason
    return f"stopped at {scaling.stopped_at:,} GPUs by {scaling.stopped_by}: {scaling.reason}"
