"""The one file of a GPU run: a table per part for readers, then all of it as JSON for programs."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FENCE = "```json"
INTRODUCTION = """# Packhorse on a GPU

Written by `make gpu`; docs/gpu.md says what the parts measure. This file has no host names, user names or secrets:
it has versions, the kind of the GPU, and measurements. To send it, attach it to an issue or a pull request.
"""


@dataclass(frozen=True)
class PartResult:
    """What a part has measured.

    Attributes:
        rows: Figures of each case, in order.
        ending: Why the part did not reach its end; empty where it did.
    """

    part: str
    rows: list[dict[str, Any]]
    seconds: float
    ending: str = ""

    @property
    def has_failed(self) -> bool:
        """Whether the part or one of its cases has no result, other than for a missing library."""
        return bool(self.ending) or any("error" in row for row in self.rows)


def write_report(file: Path, results: Sequence[PartResult]) -> None:
    """Replace the file with all results so far."""
    day = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}"
    sections = [INTRODUCTION, f"Date: {day}", *(_section(result) for result in results)]
    data = json.dumps({"date": day, "parts": [asdict(result) for result in results]}, indent=1)
    new = file.with_suffix(".tmp")
    new.write_text("\n".join([*sections, "## As JSON", "", FENCE, data, "```", ""]), encoding="utf-8")
    new.replace(file)


def read_report(file: Path) -> dict[str, Any]:
    """Return the JSON of a report."""
    text = file.read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text.rpartition(FENCE)[2].rpartition("```")[0])
    return found


def _section(result: PartResult) -> str:
    lines = [f"\n## {result.part} ({result.seconds:.0f} s)\n"]
    if result.ending:
        lines += [*(f"    {line}" for line in result.ending.splitlines()), ""]
    # Cases with the same figures share a table.
    tables: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in result.rows:
        tables.setdefault(tuple(name for name in row if name != "seconds"), []).append(row)
    for header, rows in tables.items():
        if len(rows) == 1 and len(header) > 8:  # many figures of one case read better below each other
            lines += ["| figure | value |", "|---|---|", *(f"| {name} | {_cell(rows[0][name])} |" for name in header)]
        else:
            lines += ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
            lines += ["| " + " | ".join(_cell(row[name]) for name in header) + " |" for row in rows]
        lines.append("")
    return "\n".join(lines)


def _cell(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {True: "yes", False: "**no**", None: "–"}[value]
    text = f"{value:,.5g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
    return text.replace("|", "\\|").replace("\n", "<br>")
