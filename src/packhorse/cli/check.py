"""`packhorse check RECIPE`: what the recipe does and what the model would see."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Final

from rich.console import Console

from packhorse.cli.show.parameters import parameter_lines, show_parameters
from packhorse.cli.show.text import pairs, print_plain
from packhorse.data.audit_report import AuditReport
from packhorse.errors import EXIT_OK
from packhorse.recipe.describe import summary
from packhorse.recipe.load import load_recipe
from packhorse.report.readable import readable
from packhorse.report.terminal import figure_lines, finding_lines, ledger_table, row_text, split_table
from packhorse.run_folder.folder import relative
from packhorse.workflows.check import check_recipe
from packhorse.workflows.prepared_data import manifest_if_prepared

SHOWN_ROWS: Final = 2  # the page shows more


def check(recipe: str, overrides: Sequence[str]) -> int:
    """Show the recipe, its model and its rows, and write data.html. Prepares nothing."""
    console = Console()
    loaded = load_recipe(recipe, overrides)
    manifest = manifest_if_prepared(loaded)
    vocab_size = manifest.vocab_size if manifest else None
    console.print(pairs([*summary(loaded), *parameter_lines(loaded, vocab_size)]))
    show_parameters(console, loaded, vocab_size)
    with console.status("reading rows") if console.is_terminal else nullcontext():
        checked = check_recipe(loaded)
    _show(console, checked.report)
    marks = "green" if _in_colour(console) else "between ⟦ and ⟧"
    print_plain(
        f"\nThe complete report: {relative(checked.page)}"
        f"\nNothing here stops training; trained text is {marks}. Next: packhorse train {recipe}",
        console,
    )
    return EXIT_OK


def _show(console: Console, report: AuditReport) -> None:
    console.print(pairs(figure_lines(report)))
    for table in (ledger_table(report.ledger), split_table(report.splits), finding_lines(report)):
        if table.row_count:
            console.print()
            console.print(table)
    for row in report.rows[:SHOWN_ROWS]:
        console.print(f"\n{readable(row.where)}, {row.split}", style="bold", markup=False, highlight=False)
        console.print(row_text(row, _in_colour(console)))


def _in_colour(console: Console) -> bool:
    return console.is_terminal and not console.no_color
