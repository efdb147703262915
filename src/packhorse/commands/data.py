"""`packhorse check` and `packhorse prepare`: rows, before anything is trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from packhorse.commands.lines import pairs
from packhorse.commands.parameters import parameter_lines, show_parameters
from packhorse.commands.prepared import manifest_if_prepared
from packhorse.commands.waiting import prepare_run
from packhorse.data.audit import audit
from packhorse.data.audit_report import AuditReport
from packhorse.data.prepare import PreparedData
from packhorse.data.prepare import prepare as prepare_data
from packhorse.data.resolve import runs_folder_of
from packhorse.errors import EXIT_OK
from packhorse.recipe.describe import summary
from packhorse.recipe.load import load_recipe
from packhorse.recipe.schema import Recipe
from packhorse.report.data_page import write_data_page
from packhorse.report.readable import readable
from packhorse.report.terminal import figure_lines, finding_lines, ledger_table, row_text, split_table
from packhorse.run_folder.folder import relative
from packhorse.run_folder.layout import PLAN_FILE
from packhorse.run_folder.sweep import find_sweep, member_folder, read_sweep

# The page shows more of them.
SHOWN_ROWS: Final = 2


def check(recipe: str, overrides: Sequence[str]) -> int:
    """Shows what the recipe does and what the model would see, and writes data.html; prepares nothing."""
    console = Console()
    loaded = load_recipe(recipe, overrides)
    manifest = manifest_if_prepared(loaded)
    vocab_size = manifest.vocab_size if manifest else None
    console.print(pairs([*summary(loaded), *parameter_lines(loaded, vocab_size)]))
    show_parameters(console, loaded, vocab_size)
    with console.status("reading rows") if console.is_terminal else nullcontext():
        report = audit(loaded)
    _show(console, report)
    page = page_path(loaded)
    write_data_page(report, page)
    how = "green" if _in_colour(console) else "between ⟦ and ⟧"
    console.print(
        f"\nAll of this and more: {relative(page)}"
        f"\nNothing here stops training; trained text is {how}. Next: packhorse train {recipe}",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )
    return EXIT_OK


def prepare(recipe: str, overrides: Sequence[str]) -> int:
    """Prepares the recipe's data and shows what became of every row."""
    console = Console()
    sweep = find_sweep(recipe) if not overrides else None
    runs = [recipe] if (Path(recipe) / PLAN_FILE).is_file() and not overrides else []
    if sweep is not None:
        runs = [str(member_folder(sweep, member.number)) for member in read_sweep(sweep).runs]
    for run in runs:
        prepare_run(run, lambda of_run: _prepared(of_run, console).manifest)
    if runs:
        return EXIT_OK
    done = _prepared(load_recipe(recipe, overrides), console)
    console.print()
    console.print(split_table(done.manifest.splits))
    console.print()
    console.print(ledger_table(done.manifest.ledger))
    for note in done.manifest.notes:
        console.print(f"note: {readable(note)}", markup=False, highlight=False)
    return EXIT_OK


def _prepared(recipe: Recipe, console: Console) -> PreparedData:
    done = prepare_with_progress(recipe, console)
    console.print(f"{'found' if done.was_warm else 'prepared'} {done.folder}", soft_wrap=True, highlight=False)
    return done


def prepare_with_progress(recipe: Recipe, console: Console) -> PreparedData:
    """Prepares, with a count of rows where there is a terminal."""
    with _bar(console) as bar:
        task = bar.add_task("preparing", total=None)
        return prepare_data(recipe, lambda done: bar.update(task, completed=done))


def page_path(recipe: Recipe) -> Path:
    """Where `packhorse check` writes its page."""
    return runs_folder_of(recipe) / ".check" / recipe.name / "data.html"


@contextmanager
def _bar(console: Console) -> Iterator[Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,.0f} rows"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield bar


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
