"""Read the rows of Parquet and Arrow files, and of any table that comes in batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import pyarrow
from pyarrow import ipc, parquet

from packhorse.data.read.arrow_values import RemovedNulls, RowValues
from packhorse.data.read.row import WHOLE_ROW, Row, RowMistakes, reason
from packhorse.data.read.streams import seekable
from packhorse.errors import Mistake, UserError

ROWS_AT_ONCE: Final = 1000
ARROW_FILE_MAGIC: Final = b"ARROW1"
ARROW_STREAM_END: Final = b"\xff\xff\xff\xff\x00\x00\x00\x00"
# What pyarrow raises for damaged files: ArrowException, but also plain Python errors.
UNREADABLE: Final = (
    pyarrow.ArrowException,
    OSError,
    ValueError,
    KeyError,
    TypeError,
    IndexError,
    OverflowError,
    # A wrong length in a file makes pyarrow allocate before it notices that the data is missing.
    MemoryError,
)


def read_parquet(path: Path, mistakes: RowMistakes, removed: RemovedNulls | None) -> Iterator[Row]:
    """Yield the rows of a Parquet file, one row group in memory at a time.

    Raises:
        UserError: The file cannot be read to its end, or two columns have the same name.
    """
    with seekable(path) as file:
        yield from _rows_of_file(path, "Parquet", _parquet_batches(file), mistakes, removed)


def read_arrow(path: Path, mistakes: RowMistakes, removed: RemovedNulls | None) -> Iterator[Row]:
    """Yield the rows of an Arrow file or stream, as `datasets` saves them, one record batch in memory at a time.

    Raises:
        UserError: The file cannot be read to its end, or two columns have the same name.
    """
    with seekable(path) as file:
        yield from _rows_of_file(path, "Arrow", _arrow_batches(file), mistakes, removed)


def rows_of_batches(
    batches: Iterable[pyarrow.Table], name: str, mistakes: RowMistakes, removed: RemovedNulls | None
) -> Iterator[Row]:
    """Yield the rows of tables or record batches; a row that cannot be converted does not cost the rest of its batch.

    Args:
        batches: pyarrow tables or record batches of at most a few thousand rows.
        name: Prefix of the row number in `where`.
        mistakes: Collects rows with values that Python cannot hold.
        removed: Counts the nulls that are removed from structs; None if they stay.
    """
    number = 0
    for batch in batches:
        row_values = RowValues(batch.schema, removed)
        for at, values in enumerate(_values_of(batch), number + 1):
            where = f"{name}:{at}"
            try:
                if isinstance(values, Exception):
                    raise values
                row = Row(where, row_values.convert(values))
            except (*UNREADABLE, RecursionError) as error:
                fact = f"a value of the row cannot be read: {reason(error)}"
                mistakes.add(Mistake(fact, WHOLE_ROW, "fix or remove it.", where))
            else:
                yield row
        number += batch.num_rows


def _values_of(batch: pyarrow.Table) -> list[dict[str, Any] | Exception]:
    """Return the values of each row, or the error of a row with a value that Python cannot hold."""
    try:
        return list(batch.to_pylist(maps_as_pydicts="strict"))
    except UNREADABLE as error:
        if batch.num_rows == 1:
            return [error]
        return [values for at in range(batch.num_rows) for values in _values_of(batch.slice(at, 1))]


def _rows_of_file(
    path: Path,
    form: str,
    batches: Iterator[pyarrow.RecordBatch],
    mistakes: RowMistakes,
    removed: RemovedNulls | None,
) -> Iterator[Row]:
    counted = _Counted(batches)
    # `rows_of_batches` handles errors of the rows, so only errors of the file arrive here.
    try:
        yield from rows_of_batches(counted, str(path), mistakes, removed)
    except UNREADABLE as error:
        raise UserError(
            f"the file cannot be read as {form} after row {counted.num_rows}: {reason(error)}.",
            WHOLE_ROW,
            "write or copy the file again, or give the rows as .jsonl.",
            f"{path}:{counted.num_rows + 1}",
        ) from error


class _Counted:
    """Iterate over batches and count the rows of those that were consumed."""

    def __init__(self, batches: Iterator[pyarrow.RecordBatch]) -> None:
        self.num_rows = 0
        self._batches = batches
        self._last = 0

    def __iter__(self) -> _Counted:
        return self

    def __next__(self) -> pyarrow.RecordBatch:
        self.num_rows += self._last
        self._last = 0
        batch = next(self._batches)
        self._last = batch.num_rows
        return batch


def _parquet_batches(file: pyarrow.NativeFile) -> Iterator[pyarrow.RecordBatch]:
    with parquet.ParquetFile(file, page_checksum_verification=True) as opened:
        _refuse_equal_names(opened.schema_arrow)
        yield from opened.iter_batches(batch_size=ROWS_AT_ONCE)


def _arrow_batches(file: pyarrow.NativeFile) -> Iterator[pyarrow.RecordBatch]:
    is_file = file.read(len(ARROW_FILE_MAGIC)) == ARROW_FILE_MAGIC
    if not is_file:
        _refuse_open_end(file)
    file.seek(0)
    with ipc.open_file(file) if is_file else ipc.open_stream(file) as opened:
        _refuse_equal_names(opened.schema)
        batches = map(opened.get_batch, range(opened.num_record_batches)) if is_file else opened
        for batch in batches:
            # Arrow trusts the offsets in the file: without this check a wrong one reads outside the batch's memory.
            batch.validate(full=True)
            for begin in range(0, batch.num_rows, ROWS_AT_ONCE):
                yield batch.slice(begin, ROWS_AT_ONCE)


def _refuse_open_end(file: pyarrow.NativeFile) -> None:
    """Raise ValueError unless the stream has its end mark: one cut off between two batches reads as a complete one."""
    file.seek(max(0, file.size() - len(ARROW_STREAM_END)))
    if file.read() != ARROW_STREAM_END:
        raise ValueError("the end mark is missing, so the file was cut off")


def _refuse_equal_names(schema: pyarrow.Schema) -> None:
    twice = [name for at, name in enumerate(schema.names) if name in schema.names[:at]]
    if twice:
        raise ValueError(f"two columns are named {twice[0]}")
