"""`packhorse runs`: a table of all runs of a folder. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from packhorse.cli.show.sweep_evaluation import sweep_words
from packhorse.cli.show.text import open_console, plain_table, print_json, print_plain
from packhorse.errors import EXIT_OK
from packhorse.evaluate.sweep_results import read_sweep_evaluation
from packhorse.report.evaluation_words import change_words, verdict_words
from packhorse.report.readable import readable
from packhorse.run_folder.layout import SWEEP_FILE
from packhorse.track.progress import describe_duration
from packhorse.workflows.runs import EvaluationSummary, RunSummary, list_runs

WORDS = {"broken": "cannot be read", "other": "no run"}
STYLES = {"broken": "red", "other": "dim"}


def runs(folder: str, json: bool) -> int:
    """Print one line per run of a folder.

    Raises:
        UserError: There is no such folder.
    """
    found = list_runs(Path(folder))
    if json:
        print_json([_values(summary) for summary in found])
        return EXIT_OK
    console = open_console()
    if found:
        console.print(_table(found, Path(folder)))
        for summary in found:
            if summary.problem:
                print_plain(readable(f"{summary.name}: {summary.problem}"), console)
    else:
        print_plain(f"{folder} holds no runs", console)
    return EXIT_OK


def _table(found: Sequence[RunSummary], folder: Path) -> Table:
    right = ("step", "train loss", "validation loss", "time")
    table = plain_table("run", "state", *right[:3], "evaluation", "time", right=right)
    for sweep, members in groupby(found, key=lambda summary: summary.sweep):
        if sweep:
            evaluation = readable(_of_sweep(folder, sweep))
            table.add_row(Text(readable(f"sweep {sweep}"), style="bold"), *[""] * 4, Text(evaluation))
        for summary in members:
            table.add_row(*map(Text, _cells(summary)), style=STYLES.get(summary.kind))
    return table


def _of_sweep(folder: Path, sweep: str) -> str:
    """Return the result of `packhorse evaluate` on a sweep in words; empty without one."""
    path = folder if (folder / SWEEP_FILE).is_file() else folder / sweep
    try:
        evaluation = read_sweep_evaluation(path)
    except ValueError:
        return "its evaluation cannot be read"
    return "" if evaluation is None else sweep_words(evaluation)


def _cells(summary: RunSummary) -> tuple[str, ...]:
    name = f"  {summary.name}" if summary.sweep else summary.name
    if summary.overrides:
        name += f" ({' '.join(summary.overrides)})"
    if summary.kind != "run":
        return readable(name), WORDS[summary.kind]
    return (
        readable(name),
        summary.state,
        f"{summary.step:,}/{summary.num_steps:,}",
        _loss(summary.train_loss),
        _loss(summary.validation_loss),
        readable(_evaluation(summary.evaluation)),
        "" if summary.elapsed_seconds is None else describe_duration(summary.elapsed_seconds),
    )


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _evaluation(evaluation: EvaluationSummary | None) -> str:
    if evaluation is None:
        return ""
    result = evaluation.result
    change = f"{result.metric} {change_words(result.difference, result.unit)}: {verdict_words(result)}"
    return f"{evaluation.decision}; {change}" if evaluation.decision else change


def _values(summary: RunSummary) -> dict[str, Any]:
    """Return the summary for JSON, which has no NaN and no infinity: they are strings."""
    values = dict(vars(summary))
    if summary.evaluation is not None:
        result = summary.evaluation.result.model_dump(mode="json")
        values["evaluation"] = {"set": summary.evaluation.set, "decision": summary.evaluation.decision, **result}
    return {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in values.items()
    }
