"""A recipe, its model and its rows for a terminal of 80 columns or more."""

from __future__ import annotations

from typing import Final

from rich.console import Console

from packhorse.cli.show.parameters import parameter_lines, show_parameters
from packhorse.cli.show.progress import row_progress
from packhorse.cli.show.text import open_console, pairs, print_plain
from packhorse.data.audit_report import AuditReport
from packhorse.recipe.describe import summary
from packhorse.recipe.schema import Recipe
from packhorse.report.readable import readable
from packhorse.report.terminal import figure_lines, finding_lines, ledger_table, row_text, split_table
from packhorse.run_folder.folder import relative
from packhorse.workflows.check import check_recipe
from packhorse.workflows.evaluation_power import power_of
from packhorse.workflows.prepared_data import manifest_if_prepared

SHOWN_ROWS: Final = 2  # the page shows more


def show_check(recipe: Recipe, typed: str) -> None:
    """Check a recipe and print the result.

    Args:
        recipe: Recipe.
        typed: Recipe as typed, for the next command.
    """
    console = open_console()
    manifest = manifest_if_prepared(recipe)
    vocab_size = manifest.vocab_size if manifest else None
    console.print(pairs([*summary(recipe), *parameter_lines(recipe, vocab_size)]))
    show_parameters(console, recipe, vocab_size)
    with row_progress("checking") as update:
        checked = check_recipe(recipe, update)
    _show(console, checked.report, recipe)
    marks = "green" if _in_colour(console) else "between ⟦ and ⟧"
    bad_rows = f"\nBad rows that were dropped: {relative(checked.bad_rows)}" if checked.bad_rows else ""
    print_plain(
        f"\nThe complete report: {relative(checked.page)}{bad_rows}"
        f"\nNothing here stops training; trained text is {marks}. Next: packhorse train {typed}",
        console,
    )


def _show(console: Console, report: AuditReport, recipe: Recipe) -> None:
    console.print(pairs([*figure_lines(report), ("evaluation", power_of(recipe, report.splits).words)]))
    for table in (ledger_table(report.ledger), split_table(report.splits), finding_lines(report)):
        if table.row_count:
            console.print()
            console.print(table)
    for row in report.rows[:SHOWN_ROWS]:
        console.print(f"\n{readable(row.where)}, {row.split}", style="bold", markup=False, highlight=False)
        console.print(row_text(row, _in_colour(console), whole=not console.is_terminal))


def _in_colour(console: Console) -> bool:
    return console.is_terminal and not console.no_color
