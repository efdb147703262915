"""Convert the values of Arrow rows to what the same rows hold as JSON.

All structs of a column have the same fields, so Arrow writes null for each key that a row lacks. A null in a list or in
a map is a value of the row: neither has fields that other rows add.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, Final

import pyarrow
from pyarrow import types

from packhorse.data.read.json_rows import decode

SHOWN_PATHS: Final = 3

Convert = Callable[[Any], Any]


class RemovedNulls:
    """Nulls of one source that were removed from structs.

    Attributes:
        num_rows: Rows with such a null.
        num_nulls: Number of nulls.
        by_path: Number of nulls by path, such as `messages.tool_calls.function.arguments.when`.
    """

    def __init__(self) -> None:
        self.num_rows = self.num_nulls = 0
        self.by_path: Counter[str] = Counter()

    def add(self, path: str) -> None:
        """Count a null."""
        self.num_nulls += 1
        self.by_path[path] += 1

    def note(self, name: str) -> str:
        """Return a sentence about the source of this name; empty if no null was removed."""
        if not self.num_rows:
            return ""
        most = [f"{path} {count:,}" for path, count in self.by_path.most_common(SHOWN_PATHS)]
        others = len(self.by_path) - len(most)
        return (
            f"{name}: {self.num_nulls:,} nulls were removed from {self.num_rows:,} rows ({', '.join(most)}"
            f"{f' and {others} other keys' if others else ''}), as Arrow writes null for each key that a row lacks; "
            "keep_nulls: true of the source keeps them"
        )


class RowValues:
    """Converter of the rows of one schema."""

    def __init__(self, schema: pyarrow.Schema, removed: RemovedNulls | None) -> None:
        """Prepare the conversion; with `removed` None, nulls stay."""
        self._removed = removed
        self._columns = {field.name: self._converter(field.type, field.name) for field in schema}

    def convert(self, values: dict[str, Any]) -> dict[str, Any]:
        """Return a row without the nulls that Arrow added, and with its JSON texts decoded.

        Raises:
            ValueError: A value of the type arrow.json is not JSON; RecursionError if it is nested too deeply.
        """
        removed = self._removed
        before = removed.num_nulls if removed else 0
        # A null in a column is a key that the row lacks, too; it is common, and no count would interest anyone.
        row = {
            key: convert(value) if (convert := self._columns[key]) and value is not None else value
            for key, value in values.items()
            if value is not None or removed is None
        }
        if removed and removed.num_nulls > before:
            removed.num_rows += 1
        return row

    def _converter(self, kind: pyarrow.DataType, path: str) -> Convert | None:
        """Return the function for the values of a type; None if they need no conversion."""
        if isinstance(kind, pyarrow.JsonType):
            return decode
        if types.is_struct(kind):
            return self._struct(kind, path)
        if types.is_map(kind):
            inner = self._converter(kind.item_type, path)
            return _in_map(inner) if inner else None
        if types.is_nested(kind) and hasattr(kind, "value_type"):
            inner = self._converter(kind.value_type, path)
            return _in_list(inner) if inner else None
        return None

    def _struct(self, kind: pyarrow.StructType, path: str) -> Convert | None:
        inner = {field.name: self._converter(field.type, f"{path}.{field.name}") for field in kind}
        removed = self._removed
        if removed is None and not any(inner.values()):
            return None

        def convert(values: dict[str, Any]) -> dict[str, Any]:
            kept = {}
            for key, value in values.items():
                if value is not None:
                    convert_value = inner[key]
                    kept[key] = convert_value(value) if convert_value else value
                elif removed is None:
                    kept[key] = None
                else:
                    removed.add(f"{path}.{key}")
            return kept

        return convert


def _in_map(convert: Convert) -> Convert:
    return lambda pairs: {key: None if value is None else convert(value) for key, value in pairs.items()}


def _in_list(convert: Convert) -> Convert:
    return lambda elements: [None if value is None else convert(value) for value in elements]
