"""Counts of the keys of a source's rows: used for tokens, kept as fields, or ignored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from packhorse.data.formats.example import Example


@dataclass
class KeyCounts:
    """Number of rows in which each key has a value.

    Attributes:
        used: Keys that the format reads.
        kept: Keys that are kept as fields, for `data.split` and `evaluation.group_by`.
        ignored: Keys that the source's `ignore` names, nested metadata, and parts of used keys that are not read.
    """

    used: Counter[str] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)
    ignored: Counter[str] = field(default_factory=Counter)

    def add(self, values: Mapping[str, Any], example: Example) -> None:
        """Count the keys of a row; null, empty texts and empty lists are no value."""
        used, fields = example.used, example.fields
        for key, value in values.items():
            if value is None or value in ("", []):
                continue
            counts = self.used if key in used else self.kept if key in fields else self.ignored
            counts[key] += 1
        if example.unused:
            self.ignored.update(example.unused)

    def under_names_of(self, columns: Mapping[str, str]) -> dict[str, dict[str, int]]:
        """Return `used`, `kept` and `ignored` with their keys; a key that `columns` maps is shown with the row's."""
        groups = {"used": self.used, "kept": self.kept, "ignored": self.ignored}
        return {
            group: {f"{key} ({columns[key]})" if key in columns else key: rows for key, rows in sorted(counts.items())}
            for group, counts in groups.items()
        }
