"""`packhorse prepare`: rows become token ids, masks and packs on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from packhorse.cli.show.progress import row_progress
from packhorse.cli.show.text import open_console
from packhorse.data.data_manifest import DataManifest
from packhorse.data.packs.batches import step_notes
from packhorse.errors import EXIT_OK
from packhorse.recipe.load import load_recipe
from packhorse.recipe.schema import Recipe
from packhorse.report.readable import readable
from packhorse.report.terminal import ledger_table, split_table
from packhorse.run_folder.layout import PLAN_FILE
from packhorse.run_folder.sweep import find_sweep, member_folders
from packhorse.workflows.prepare import prepare_data, prepare_run


def prepare(recipe: str, overrides: Sequence[str]) -> int:
    """Prepare the data of a recipe, a run or a sweep; for a recipe, show what became of every row."""
    console = open_console()
    runs = _runs_of(recipe) if not overrides else []
    for run in runs:
        prepare_run(run, lambda of_run: prepare_shown(of_run, console))
    if runs:
        return EXIT_OK
    loaded = load_recipe(recipe, overrides)
    manifest = prepare_shown(loaded, console)
    console.print()
    console.print(split_table(manifest.splits))
    console.print()
    console.print(ledger_table(manifest.ledger))
    for note in (*manifest.notes, *step_notes(manifest.splits["train"].num_packs, loaded.batch.packs)):
        console.print(f"note: {readable(note)}", markup=False, highlight=False)
    return EXIT_OK


def _runs_of(name: str) -> list[str]:
    sweep = find_sweep(name)
    if sweep is not None:
        return [str(folder) for folder in member_folders(sweep)]
    return [name] if (Path(name) / PLAN_FILE).is_file() else []


def prepare_shown(recipe: Recipe, console: Console) -> DataManifest:
    """Prepare data with a progress bar, and print its folder."""
    with row_progress("preparing") as update:
        data = prepare_data(recipe, update)
    console.print(f"{'found' if data.was_warm else 'prepared'} {data.folder}", soft_wrap=True, highlight=False)
    return data.manifest


def prepare_with_progress(recipe: Recipe) -> DataManifest:
    """Prepare data, with a progress bar if there is a terminal."""
    with row_progress("preparing") as update:
        return prepare_data(recipe, update).manifest
