"""Reading a file as a source, from a test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from packhorse.data.gather.sources import read_rows
from packhorse.data.read.row import Row, RowMistakes
from packhorse.errors import UserError
from packhorse.recipe.schema import Source

Found = list[tuple[str, dict[str, Any]]]


def rows_of(path: Path | str, mistakes: RowMistakes | None = None, **fields: Any) -> Iterator[Row]:
    return read_rows(Source(path=str(path), **fields), Path("runs"), mistakes)


def read(path: Path | str, **fields: Any) -> Found:
    """Each row with `file:line`, without the folders."""
    return [(Path(row.where).name, row.values) for row in rows_of(path, **fields)]


def read_all(path: Path | str, **fields: Any) -> tuple[Found, list[str]]:
    """The rows that can be read, and the words for each that cannot."""
    mistakes = RowMistakes("the source")
    rows = [(Path(row.where).name, row.values) for row in rows_of(path, mistakes, **fields)]
    return rows, [f"{Path(mistake.where).name}: {mistake.fact}" for mistake in mistakes.recorded]


def mistake_of(path: Path | str, **fields: Any) -> str:
    with pytest.raises(UserError) as caught:
        read(path, **fields)
    return str(caught.value)
