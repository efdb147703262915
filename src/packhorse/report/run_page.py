"""report.html: one self-contained page about a run, without scripts or external requests; report.json beside it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from packhorse.data.packs.store import SEALED_SPLIT
from packhorse.data.seal import describe_looks
from packhorse.durable import replace_file
from packhorse.errors import UserError
from packhorse.evaluate.results import Comparison, opinion_notes
from packhorse.report.curves import HEIGHT, MOST_POINTS, WIDTH, plot_of, shown_tick
from packhorse.report.data_page import Tile, environment_of_pages
from packhorse.report.effects import SetView, set_views
from packhorse.report.evaluation_words import (
    Headline,
    change_words,
    headline_of,
    interval_words,
    value_words,
)
from packhorse.report.ledger_lines import ledger_lines
from packhorse.report.readable import clipped
from packhorse.report.row_changes import MOST_ROWS
from packhorse.report.run_report import GIB, RunReport
from packhorse.run_folder.layout import REPORT_FIGURES_FILE, REPORT_FILE
from packhorse.track.progress import describe_duration

TEMPLATE: Final = "run_page.html.jinja"
MOST_ATTEMPTS: Final = 50
MOST_SKIPPED: Final = 50
LONGEST_MESSAGE_CHARACTERS: Final = 400


def write_run_page(report: RunReport, folder: Path, shown_folder: str) -> Path:
    """Write RUN/report.html and RUN/report.json, and replace earlier ones; return the path of the page.

    Args:
        report: What the page shows.
        folder: Folder of the run.
        shown_folder: The folder as the user would type it, for the command that comes next.

    Raises:
        UserError: The folder cannot be written.
    """
    pages = {
        REPORT_FIGURES_FILE: report.model_dump_json(indent=1) + "\n",
        REPORT_FILE: render_run_page(report, shown_folder),
    }
    for name, text in pages.items():
        try:
            replace_file(folder / name, text, writer=f".draft-{os.getpid()}")
        except OSError as error:
            raise UserError(
                f"{folder / name} cannot be written: {error.strerror}.",
                "the report is a part of the run folder.",
                "free space there, or fix the permissions of that folder.",
            ) from error
    return folder / REPORT_FILE


def render_run_page(report: RunReport, shown_folder: str) -> str:
    """Return the page as HTML; all text of rows, answers and names is escaped."""
    environment = environment_of_pages()
    environment.filters.update(
        tick=shown_tick,
        at="{:.2f}%".format,
        clock=_clock,
        duration=describe_duration,
        clipped=_clipped_message,
        value=_value_of(report),
    )
    sets = list(_sets(report))
    both = [each for each in (report.evaluation, report.test_evaluation) if each is not None]
    plots = [plot_of(curve) for curve in report.curves]
    elapsed = report.speed.elapsed_seconds
    return environment.get_template(TEMPLATE).render(
        report=report,
        headline=headline(report, shown_folder),
        warnings=list(_warnings(both)),
        elapsed=describe_duration(elapsed) if elapsed is not None else "",
        parts=list(_parts(report, bool(sets), bool(plots))),
        sets=sets,
        opinions=[note for each in both for note in opinion_notes(each)],
        failures=[failure for each in both for failure in each.failures],
        gate=[result for each in both for result in each.gate],
        looks=_looks(report),
        changes=report.changes,
        most_rows=MOST_ROWS,
        plots=plots,
        most_points=MOST_POINTS,
        width=WIDTH,
        height=HEIGHT,
        tiles=list(_tiles(report)),
        times=list(_times(report)),
        attempts=report.attempts[-MOST_ATTEMPTS:],
        num_attempts_more=max(0, len(report.attempts) - MOST_ATTEMPTS),
        lost=_lost(report),
        skipped=[(f"step {step:,}", why) for step, why in list(report.skipped_steps.items())[:MOST_SKIPPED]],
        ledger=ledger_lines(report.data.ledger) if report.data is not None else (),
    )


def headline(report: RunReport, shown_folder: str) -> Headline:
    """Return the verdict on the run, or why there is none and what to type."""
    for comparison in (report.evaluation, report.test_evaluation):
        found = headline_of(comparison) if comparison is not None else None
        if found is not None:
            return found
    if report.state == "finished":
        return Headline("none", "This run is not evaluated yet.", command=f"packhorse evaluate {shown_folder}")
    progress = f"{report.state}, step {report.step:,} of {report.num_steps:,}"
    command = "resume" if report.state in ("stopped", "failed") else "status"
    sentence = f"This run is not evaluated yet: it has not finished ({progress})."
    return Headline("none", sentence, command=f"packhorse {command} {shown_folder}")


def _warnings(comparisons: list[Comparison]) -> Iterator[str]:
    """Yield what the headline does not say: metrics of retain rows on which the tuned model is worse."""
    for comparison in comparisons:
        for line in comparison.lines:
            for result in line.metrics if line.set == "retain" and line.group is None else ():
                if result.verdict == "worse":
                    change = change_words(result.difference, result.unit)
                    yield (
                        f"Old skills are worse: {result.metric} on {line.set} rows changes by {change} "
                        f"({interval_words(result)})."
                    )


def _sets(report: RunReport) -> Iterator[SetView]:
    for comparison in (report.evaluation, report.test_evaluation):
        if comparison is not None:
            yield from set_views(comparison.lines)


def _looks(report: RunReport) -> str:
    if report.data is not None and SEALED_SPLIT not in report.data.splits:
        return "There is no test set."
    given = [part.test_looks for part in (report.evaluation, report.test_evaluation, report.data) if part is not None]
    words = describe_looks(max(given, key=len, default=()))
    return f"{words[:1].upper()}{words[1:]}." if words else "The test set was still sealed at this evaluation."


def _parts(report: RunReport, has_sets: bool, has_plots: bool) -> Iterator[tuple[str, str]]:
    if has_sets:
        yield "evaluation", "Evaluation"
    if report.changes is not None:
        yield "rows", "Wins and losses"
    if has_plots:
        yield "curves", "Curves"
    yield "speed", "Speed and memory"
    yield "attempts", "Attempts"
    if report.data is not None:
        yield "ledger", "Data"
    yield "environment", "Environment"


def _tiles(report: RunReport) -> Iterator[Tile]:
    speed, predicted = report.speed, report.predicted
    if speed.tokens_per_second is not None:
        yield Tile("Throughput", f"{speed.tokens_per_second:,.0f}", "tokens per second")
    if speed.mfu is not None:
        yield Tile("MFU", f"{100 * speed.mfu:.1f} %", "of the GPU's peak FLOPs")
    if speed.step_seconds is not None:
        below = f"per step; the plan expected {predicted.step_seconds:.3g} s" if predicted is not None else "per step"
        yield Tile("Step", f"{speed.step_seconds:.3g} s", below)
    if speed.peak_bytes is not None:
        below = "highest of rank 0"
        if predicted is not None:
            below += (
                f"; the plan expected {predicted.required_bytes / GIB:.2f} of {predicted.memory_bytes / GIB:.0f} GiB"
            )
        yield Tile("Peak memory", f"{speed.peak_bytes / GIB:.2f} GiB", below)


def _times(report: RunReport) -> Iterator[tuple[str, float, float]]:
    names = {"data": "waiting for data"}
    total = sum(report.speed.seconds.values())
    for name, seconds in report.speed.seconds.items() if total > 0 else ():
        yield names.get(name, name), seconds, seconds / total


def _lost(report: RunReport) -> str:
    if not report.made_steps:
        return "No step was made."
    if not report.lost_steps:
        return f"{report.made_steps:,} steps were made, and none was lost."
    share = report.lost_steps / report.made_steps
    return f"{report.lost_steps:,} of {report.made_steps:,} steps ({100 * share:.1f} %) were lost or repeated."


def _value_of(report: RunReport) -> Callable[[float], str]:
    unit = report.changes.unit if report.changes is not None else ""
    return lambda value: value_words(value, unit)


def _clock(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _clipped_message(text: str) -> str:
    return clipped(text, LONGEST_MESSAGE_CHARACTERS)
