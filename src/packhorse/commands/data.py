"""`packhorse check` and `packhorse prepare`: rows, before anything is trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from packhorse.commands.plan import pairs
from packhorse.data.audit import AuditReport, RowAudit, audit
from packhorse.data.manifest import DataManifest
from packhorse.data.prepare import PreparedData
from packhorse.data.prepare import prepare as prepare_data
from packhorse.errors import EXIT_OK
from packhorse.recipe.describe import summary
from packhorse.recipe.load import load_recipe
from packhorse.recipe.schema import Recipe


def check(recipe: str, overrides: Sequence[str]) -> int:
    """Shows what the recipe does and what the model would see; prepares nothing."""
    console = Console()
    loaded = load_recipe(recipe, overrides)
    console.print(pairs(summary(loaded)))
    report = audit(loaded)
    console.print(pairs(_audit_lines(report, loaded)))
    for row in report.rows:
        console.print(f"\n{row.where}", style="bold", markup=False, highlight=False)
        console.print(_marked(row, in_colour=console.is_terminal and not console.no_color))
    how = "green" if console.is_terminal and not console.no_color else "between ⟦ and ⟧"
    console.print(
        f"\nAll is well; trained text is {how}. Next: packhorse train {recipe}", soft_wrap=True, highlight=False
    )
    return EXIT_OK


def prepare(recipe: str, overrides: Sequence[str]) -> int:
    """Prepares the recipe's data and shows what became of every row."""
    console = Console()
    done = prepare_with_progress(load_recipe(recipe, overrides), console)
    console.print(f"{'found' if done.was_warm else 'prepared'} {done.folder}", soft_wrap=True, highlight=False)
    console.print(_splits(done.manifest))
    console.print(_ledger(done.manifest))
    return EXIT_OK


def prepare_with_progress(recipe: Recipe, console: Console) -> PreparedData:
    """Prepares, with a bar where there is a terminal."""
    with _bar(console) as bar:
        task = bar.add_task("preparing rows", total=None)
        return prepare_data(recipe, lambda done, total: bar.update(task, completed=done, total=total))


@contextmanager
def _bar(console: Console) -> Iterator[Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield bar


def _audit_lines(report: AuditReport, recipe: Recipe) -> list[tuple[str, str]]:
    at = report.length_percentiles
    lines = [
        (source.name, f"{source.num_rows:,} rows, {source.row_format}, for {source.use}") for source in report.sources
    ]
    lines += [
        ("rows", ", ".join(f"{split} {num:,}" for split, num in report.rows_by_split.items())),
        (
            "tokens a row",
            f"median {at[50]:,}, 99 % up to {at[99]:,}, longest {at[100]:,} (T is {recipe.batch.length:,})",
        ),
        ("supervised", f"{report.supervised_share:.1%} of {report.num_tokens:,} tokens"),
        ("stop token", f"{report.stop_token}, supervised after every answer"),
    ]
    if report.num_over_long:
        lines.append(("over-long", f"{report.num_over_long:,} rows: data.over_long is {recipe.data.over_long}"))
    return lines


def _marked(row: RowAudit, in_colour: bool) -> Text:
    """The row with its supervised text in green, or in brackets where there is no colour."""
    text = Text()
    for piece, supervised in row.pieces:
        if in_colour:
            text.append(piece, style="green" if supervised else "dim")
        else:
            text.append(f"⟦{piece}⟧" if supervised else piece)
    return text


def _splits(manifest: DataManifest) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("split")
    for heading in ("rows", "tokens", "supervised", "packs", "fill"):
        table.add_column(heading, justify="right")
    for name, split in manifest.splits.items():
        counts = (split.num_rows, split.num_tokens, split.num_supervised_tokens, split.num_packs)
        table.add_row(name, *(f"{count:,}" for count in counts), f"{split.fill:.2%}")
    return table


def _ledger(manifest: DataManifest) -> str:
    ledger = manifest.ledger
    left_out = [
        (ledger.over_long_dropped, "longer than batch.length"),
        (ledger.emptied_by_truncation, "nothing to train on after truncation"),
        (ledger.retain_unused, "of data.retain, neither evaluated nor trained on again"),
    ]
    out = "".join(f", {count:,} {words}" for count, words in left_out if count)
    return f"{ledger.rows_in:,} rows in = {ledger.rows_kept:,} kept{out}; {ledger.truncated:,} truncated"
