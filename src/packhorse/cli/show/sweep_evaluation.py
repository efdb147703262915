"""The evaluation of a sweep as a table: best first, each against its base and against the best."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from packhorse.cli.show.text import plain_table, print_plain
from packhorse.evaluate.results import MetricResult
from packhorse.evaluate.sweep_results import SweepEvaluation, SweepLine
from packhorse.report.evaluation_words import change_words, interval_words, value_words, verdict_words
from packhorse.report.readable import readable


def show_sweep_evaluation(evaluation: SweepEvaluation, console: Console) -> None:
    """Print the table, and what it rests on."""
    result = evaluation.lines[0].result
    folds = f", {evaluation.num_folds} folds pooled" if evaluation.num_folds > 1 else ""
    print_plain(f"{result.metric} on {evaluation.set} rows{folds}; best first", console)
    right = ("rows", "base → tuned")
    mean = ("mean ± sd of folds",) if evaluation.num_folds > 1 else ()
    table = plain_table("run", *right, *mean, "against its base", "against the best", right=right)
    for line in evaluation.lines:
        cells = [name_of(line), f"{line.result.num_pairs:,}", _values(line.result)]
        cells += [_of_folds(line)] if mean else []
        against = _change(line.against_best) if line.against_best is not None else line.problem or "best"
        table.add_row(*(Text(readable(cell)) for cell in (*cells, _change(line.result), against)))
    console.print(table)
    results = [each for line in evaluation.lines for each in (line.result, line.against_best) if each is not None]
    tests = ", ".join(sorted({each.test for each in results}))
    print_plain(f"tests: {tests}; in this table together at most 5 % wrong verdicts (Holm).", console)
    for name, why in evaluation.left_out.items():
        print_plain(readable(f"{name} is not in the table: {why}"), console)
    if len(evaluation.lines) > 1:
        print_plain("the best was chosen on these rows, so its value is too good; --test measures it once.", console)


def sweep_words(evaluation: SweepEvaluation) -> str:
    """Return the best line of a sweep in one sentence, for the list of runs."""
    best = evaluation.lines[0]
    head = f"best: {name_of(best)}; " if len(evaluation.lines) > 1 else ""
    folds = f", folds {_of_folds(best)}" if best.fold_mean is not None else ""
    return f"{head}{best.result.metric} {_values(best.result)}{folds}; {_change(best.result)}"


def name_of(line: SweepLine) -> str:
    """Return the run, or the first and last run of pooled folds, with the overrides."""
    name = line.runs[0] if len(line.runs) == 1 else f"{line.runs[0]} to {line.runs[-1]}"
    return f"{name} ({' '.join(line.overrides)})" if line.overrides else name


def _values(result: MetricResult) -> str:
    return f"{value_words(result.base, result.unit)} → {value_words(result.tuned, result.unit)}"


def _of_folds(line: SweepLine) -> str:
    unit = line.result.unit
    return f"{value_words(line.fold_mean, unit)} ± {value_words(line.fold_deviation, unit)}"


def _change(result: MetricResult) -> str:
    interval = interval_words(result)
    change = change_words(result.difference, result.unit) + (f" [{interval}]" if interval else "")
    return f"{change}: {verdict_words(result)}"
