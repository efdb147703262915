"""Tables of a benchmark: for the terminal, and dated in docs/lab-log.md."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

LAB_LOG = Path(__file__).parent.parent / "docs" / "lab-log.md"
TITLE = "# Lab log\n\nWhat was measured, when and on what; newest last. `make bench` measures again.\n"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that reads well as text too: first column to the left, figures to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [header, rule, *rows]
    return "\n".join("| " + " | ".join(_padded(line, widths)) + " |" for line in lines)


def _padded(cells: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [cells[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:]))]


def machine(num_threads: int, packages: Sequence[str]) -> str:
    """Processor, cores, threads and versions, in a line."""
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    threads = f"{num_threads} thread{'s' if num_threads > 1 else ''}"
    return f"{_processor()}, {os.cpu_count()} cores, {threads}; Python {platform.python_version()}, {versions}"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def append(title: str, text: str) -> None:
    """Adds a dated section to docs/lab-log.md."""
    LAB_LOG.parent.mkdir(exist_ok=True)
    if not LAB_LOG.exists():
        LAB_LOG.write_text(TITLE, encoding="utf-8")
    with LAB_LOG.open("a", encoding="utf-8") as file:
        file.write(f"\n## {datetime.datetime.now(datetime.UTC):%Y-%m-%d} {title}\n\n{text.strip()}\n")
