"""Rows from files and the hub, each with the line that it stands on."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import datasets
import pyarrow
from pyarrow import parquet

from packhorse.data.places import source_name, source_path
from packhorse.data.reading.mistakes import RowMistakes
from packhorse.errors import Mistake, UserError
from packhorse.recipe.schema import Source

SHOWN_CHARACTERS: Final = 80
EXTENSIONS: Final = (".jsonl", ".json", ".csv", ".parquet")
WHOLE_ROW: Final = "every row is either trained on or accounted for, so none is skipped."


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it was read.

    Attributes:
        where: `file:line`; for Parquet and the hub the row's number takes the line's place.
        values: The row's keys and values.
    """

    where: str
    values: dict[str, Any]


def read_rows(source: Source, runs_folder: Path, mistakes: RowMistakes | None = None) -> Iterator[Row]:
    """Yield the rows of a source in their order.

    Args:
        source: File or hub data set.
        runs_folder: Folder of runs, where `builtin:` files are written.
        mistakes: Collects the rows that cannot be read; without it they are raised together at the end.

    Raises:
        UserError: The file cannot be read, or holds no row.
    """
    found = RowMistakes(source_name(source)) if mistakes is None else mistakes
    num_rows = 0
    for num_rows, row in enumerate(_open(source, runs_folder, found), 1):  # noqa: B007
        yield row
    if mistakes is None:
        found.raise_if_any()
    if num_rows == 0 and not found.told():
        raise UserError(f"{source_name(source)} holds no row.", "there is nothing to learn.", "name another file.")


def _open(source: Source, runs_folder: Path, mistakes: RowMistakes) -> Iterator[Row]:
    if source.path is None:
        return _read_hub(source)
    path = source_path(source.path, runs_folder)
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
    if path.suffix.lower() not in readers:
        raise UserError(
            f"the data source {path} ends in {path.suffix or 'no extension'}.",
            "the extension says how to read it.",
            f"give it in one of the forms {', '.join(EXTENSIONS)}.",
        )
    return readers[path.suffix.lower()](path, mistakes)


def _read_jsonl(path: Path, mistakes: RowMistakes) -> Iterator[Row]:
    with path.open("rb") as file:
        # Iterating bytes splits on \n alone: text mode or splitlines() would also split inside a row, at U+2028.
        for number, line in enumerate(file, 1):
            text = _decode(line, path, number, mistakes)
            if text is None or not text.strip():
                continue
            try:
                values = json.loads(text.rstrip("\r\n"))
            except (ValueError, RecursionError) as error:
                mistakes.add(_broken(f"{path}:{number}", "the line is no JSON", error, text))
                continue
            yield from _as_row(values, f"{path}:{number}", mistakes)


def _decode(line: bytes, path: Path, number: int, mistakes: RowMistakes) -> str | None:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        shown = line.decode("utf-8", errors="replace")
        mistakes.add(_broken(f"{path}:{number}", "the line is no UTF-8", error, shown))
        return None


def _as_row(values: object, where: str, mistakes: RowMistakes) -> Iterator[Row]:
    if isinstance(values, dict):
        yield Row(where, values)
        return
    shown = json.dumps(values, ensure_ascii=False)[:SHOWN_CHARACTERS]
    mistakes.add(
        Mistake(
            f"the row is no JSON object but {type(values).__name__}: {shown}",
            "a row has named fields, such as messages.",
            'write it as {"messages": […]} or in another known format.',
            where,
        )
    )


def _broken(where: str, fact: str, error: Exception, text: str) -> Mistake:
    reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
    if isinstance(error, json.JSONDecodeError):
        reason = f"{error.msg} at column {error.colno}"
    return Mistake(
        f"{fact}: {reason}; it begins {text.strip()[:SHOWN_CHARACTERS]}",
        WHOLE_ROW,
        "mend or remove the line.",
        where,
    )


def _read_json(path: Path, mistakes: RowMistakes) -> Iterator[Row]:
    text = "".join(_whole_text(path))
    decoder = json.JSONDecoder()
    at, line, counted = _skip(text, 0), 1, 0
    if text[at : at + 1] != "[":
        raise UserError(
            f"{path} begins with {text[at : at + SHOWN_CHARACTERS]!r}.",
            "a .json file holds one array of rows.",
            "write the rows as [{…}, {…}]; a file of one row a line is named .jsonl.",
        )
    at = _skip(text, at + 1)
    while text[at : at + 1] != "]":
        line, counted = line + text.count("\n", counted, at), at
        where = f"{path}:{line}"
        try:
            values, at = decoder.raw_decode(text, at)
            at = _skip(text, at)
            if text[at : at + 1] not in (",", "]"):
                raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
        except (ValueError, RecursionError) as error:
            # What follows a broken element cannot be told apart from it.
            raise UserError.of([_broken(where, "the array cannot be read on", error, text[counted:])]) from error
        yield from _as_row(values, where, mistakes)
        at = _skip(text, at + 1) if text[at] == "," else at


def _skip(text: str, at: int) -> int:
    while text[at : at + 1] in (" ", "\t", "\r", "\n"):
        at += 1
    return at


def _whole_text(path: Path) -> Iterator[str]:
    mistakes = RowMistakes(str(path))
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            text = _decode(line, path, number, mistakes)
            if text is not None:
                yield text
    mistakes.raise_if_any()


def _read_csv(path: Path, mistakes: RowMistakes) -> Iterator[Row]:
    # A text column may be longer than the module's default limit of 131,072 characters.
    csv.field_size_limit(sys.maxsize)

    reader = csv.reader(_whole_text(path), strict=True)
    header = next(reader, [])
    start = reader.line_num + 1
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise UserError.of(
                [_broken(f"{path}:{start}", "the line is no CSV", ValueError(str(error)), "")]
            ) from error
        if cells is None:
            return
        where, start = f"{path}:{start}", reader.line_num + 1
        if not cells:
            continue
        if len(cells) != len(header):
            mistakes.add(_uneven(where, cells, header))
            continue
        yield Row(where, dict(zip(header, cells)))


def _uneven(where: str, cells: list[str], header: list[str]) -> Mistake:
    return Mistake(
        f"the row has {len(cells)} cells and the header {len(header)} ({', '.join(header)}); it begins "
        f"{','.join(cells)[:SHOWN_CHARACTERS]}",
        WHOLE_ROW,
        "put a cell that holds commas or line breaks in double quotes.",
        where,
    )


def _read_parquet(path: Path, _: RowMistakes) -> Iterator[Row]:
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(f"{path}:{number}", values)
    except pyarrow.ArrowException as error:
        raise UserError(
            f"{path} cannot be read as Parquet after row {number}: {error}",
            WHOLE_ROW,
            "write the file again, or give the rows as .jsonl.",
        ) from error


def _read_hub(source: Source) -> Iterator[Row]:
    try:
        rows = datasets.load_dataset(source.id, name=source.subset, revision=source.revision, split=source.split)
    except Exception as error:  # the hub client raises dozens of types, from several libraries
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"the data set {source.id} (subset {source.subset}, split {source.split}) cannot be had: {reason}",
            "rows are read before anything is trained.",
            "check the name; unset HF_HUB_OFFLINE where the machine has a network, or download the file elsewhere "
            "and give its path as data.sources[].path.",
        ) from error
    for number, values in enumerate(rows, 1):
        yield Row(f"{source.id}:{number}", values)
