"""Read rows from files and the hub, each with its file and line."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from itertools import chain
from pathlib import Path

from packhorse.data.read.arrow_rows import ROWS_AT_ONCE, read_arrow, read_parquet, rows_of_batches
from packhorse.data.read.arrow_values import RemovedNulls
from packhorse.data.read.json_array import no_keys, read_json, read_lines_or_array
from packhorse.data.read.listing import form_of
from packhorse.data.read.row import Row, RowMistakes
from packhorse.data.read.table_rows import find_delimiter, read_table
from packhorse.data.resolve import source_files, source_name
from packhorse.errors import UserError
from packhorse.recipe.schema import Source


def read_rows(
    source: Source, runs_folder: Path, mistakes: RowMistakes | None = None, removed: RemovedNulls | None = None
) -> Iterator[Row]:
    """Yield the rows of a source in their order, file after file.

    Args:
        source: File, folder, glob or hub data set.
        runs_folder: Folder of runs, for `builtin:` files.
        mistakes: Collects the rows that cannot be read; without it they are raised together at the end.
        removed: Counts the nulls that Arrow added and that are removed; `keep_nulls` of the source keeps them.

    Raises:
        UserError: A file cannot be read to its end, or the source has no rows.
    """
    nulls = None if source.keep_nulls else removed or RemovedNulls()
    collected = RowMistakes(source_name(source)) if mistakes is None else mistakes
    if source.path is None:
        rows = _read_hub(source, collected, nulls)
    else:
        rows = _read_files(source, source.path, runs_folder, collected, nulls)
    num_before = collected.num_rows
    first = next(rows, None)
    # A source with only broken rows is not an empty one: its mistakes say why there is no row.
    if first is None and collected.num_rows == num_before:
        raise UserError(f"{source_name(source)} has no rows.", "there is nothing to train on.", "name another source.")
    if first is not None:
        yield first
        yield from rows
    if mistakes is None:
        collected.raise_if_any()


def _read_files(
    source: Source, text: str, runs_folder: Path, mistakes: RowMistakes, removed: RemovedNulls | None
) -> Iterator[Row]:
    files = source_files(text, runs_folder)
    return chain.from_iterable(_read_file(path, source, mistakes, removed) for path in files)


def _read_file(path: Path, source: Source, mistakes: RowMistakes, removed: RemovedNulls | None) -> Iterator[Row]:
    form = form_of(path)[0]
    if form == ".json":
        return read_json(path, mistakes, source.key)
    if source.key is not None:
        raise no_keys(f"{path}, which is a {form} file", source.key)
    if form in (".csv", ".tsv"):
        delimiter = source.delimiter or find_delimiter(path, "," if form == ".csv" else "\t")
        return read_table(path, delimiter, not _by_number(source), mistakes)
    if form in (".parquet", ".arrow"):
        return (read_parquet if form == ".parquet" else read_arrow)(path, mistakes, removed)
    return read_lines_or_array(path, mistakes)


def _by_number(source: Source) -> bool:
    """Return whether columns are named by numbers only, which means that the file has no header line."""
    names = source.columns.values()
    return bool(names) and all(name.isascii() and name.isdigit() for name in names)


def _read_hub(source: Source, mistakes: RowMistakes, removed: RemovedNulls | None) -> Iterator[Row]:
    datasets = import_module("datasets")  # slow: it imports pandas, which files do not need
    try:
        rows = datasets.load_dataset(source.id, name=source.subset, revision=source.revision, split=source.split)
        # As Arrow, images and sound stay bytes, and reading is ten times as fast as row by row.
        batches = rows.with_format("arrow").iter(ROWS_AT_ONCE)
    except Exception as error:  # the hub client raises dozens of types, from several libraries
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"the data set {source.id} (subset {source.subset}, split {source.split}) is not available: {reason}",
            "all rows are read before training starts.",
            "check the name; unset HF_HUB_OFFLINE if this machine has a network, or download the file elsewhere "
            "and give its path as data.sources[].path.",
        ) from error
    yield from rows_of_batches(batches, f"{source.id}", mistakes, removed)
