"""`packhorse compare RUN RUN …`: what differs between runs, and which is better on the rows that both answered."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from packhorse.cli.show.text import open_console, plain_table, print_json, print_plain
from packhorse.errors import EXIT_OK
from packhorse.report.evaluation_words import change_words, interval_words, value_words, verdict_words
from packhorse.report.readable import clipped, readable
from packhorse.track.progress import describe_duration
from packhorse.workflows.compare import FinalFigures, PairedComparison, RunComparison, compare_runs

STYLES = {"better": "green", "worse": "red", "not finite": "red"}
LONGEST_VALUE = 60
GIB = 2**30


def compare(first: str, second: str, others: list[str], json: bool) -> int:
    """Print what differs between runs, their final figures, and paired tests against the first.

    Raises:
        UserError: A run cannot be opened, or the runs are one.
    """
    found = compare_runs([first, second, *others])
    if json:
        print_json(_values(found))
        return EXIT_OK
    console = open_console()
    if found.differences:
        console.print(_differences(found))
    else:
        print_plain("recipe, data and code are equal", console)
    console.print()
    console.print(_figures(found))
    for comparison in found.paired:
        console.print()
        print_plain(f"{comparison.second} against {comparison.first}, on the rows that both answered", console)
        if comparison.problem is None:
            console.print(_paired(comparison))
        else:
            print_plain(str(comparison.problem), console)
    if tests := sorted({each.result.test for comparison in found.paired for each in comparison.results}):
        print_plain(f"tests: {', '.join(tests)}; together at most 5 % wrong verdicts (Holm).", console)
    return EXIT_OK


def _differences(found: RunComparison) -> Table:
    table = plain_table("what differs", *found.names)
    for each in found.differences:
        table.add_row(Text(each.field), *(Text(_shown(value)) for value in each.values))
    return table


def _shown(value: object) -> str:
    return "none" if value is None else readable(clipped(str(value), LONGEST_VALUE))


def _figures(found: RunComparison) -> Table:
    table = plain_table("final figures", *found.names)
    columns = [dict(_figure_cells(figures)) for figures in found.figures]
    for label in columns[0]:
        table.add_row(label, *(Text(column[label]) for column in columns))
    return table


def _figure_cells(figures: FinalFigures) -> Iterator[tuple[str, str]]:
    summary = figures.summary
    evaluation = summary.evaluation
    yield "state", summary.state or readable(summary.problem)
    yield "step", f"{summary.step:,} of {summary.num_steps:,}"
    yield "train loss", _number(summary.train_loss)
    yield "validation loss", _number(summary.validation_loss)
    yield "tokens per second", "–" if figures.tokens_per_second is None else f"{figures.tokens_per_second:,.0f}"
    yield "peak memory", "–" if figures.peak_bytes is None else f"{figures.peak_bytes / GIB:.2f} GiB"
    yield "time", "–" if summary.elapsed_seconds is None else describe_duration(summary.elapsed_seconds)
    if evaluation is None:
        yield "against its base", "not evaluated"
    else:
        result = evaluation.result
        change = f"{result.metric} {change_words(result.difference, result.unit)}: {verdict_words(result)}"
        yield "against its base", f"{evaluation.decision}; {change}" if evaluation.decision else change


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _paired(comparison: PairedComparison) -> Table:
    right = ("rows", "first → second", "change, 95 % interval")
    table = plain_table("set", "metric", *right, "the second is", right=right)
    for each in comparison.results:
        result = each.result
        interval = interval_words(result)
        change = change_words(result.difference, result.unit) + (f" [{interval}]" if interval else "")
        cells = (
            each.set,
            readable(result.metric),
            f"{result.num_pairs:,}",
            f"{value_words(result.base, result.unit)} → {value_words(result.tuned, result.unit)}",
            change,
        )
        table.add_row(*map(Text, cells), Text(verdict_words(result), style=STYLES.get(result.verdict, "")))
    return table


def _values(found: RunComparison) -> dict[str, Any]:
    """Return the comparison for JSON: in a result, `base` is the first run and `tuned` the second."""
    return {
        "runs": found.names,
        "differences": [vars(each) for each in found.differences],
        "figures": [_figure_values(figures) for figures in found.figures],
        "paired": [
            {
                "first": comparison.first,
                "second": comparison.second,
                "problem": None if comparison.problem is None else comparison.problem.mistakes[0].fact,
                "results": [{"set": each.set, **each.result.model_dump(mode="json")} for each in comparison.results],
            }
            for comparison in found.paired
        ],
    }


def _figure_values(figures: FinalFigures) -> dict[str, Any]:
    summary = figures.summary
    values: dict[str, Sequence[Any] | float | str | None] = {
        "state": summary.state,
        "step": summary.step,
        "num_steps": summary.num_steps,
        "train_loss": summary.train_loss,
        "validation_loss": summary.validation_loss,
        "elapsed_seconds": summary.elapsed_seconds,
        "tokens_per_second": figures.tokens_per_second,
        "peak_bytes": figures.peak_bytes,
    }
    return {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in values.items()
    }
