"""One row as it was read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it was read.

    Attributes:
        where: `file:line`; for Parquet, Arrow and the hub the row's number takes the line's place.
        values: The row's keys and values.
    """

    where: str
    values: dict[str, Any]
