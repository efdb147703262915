"""Files that grow by a line: what a power cut tears is one line, which is left out when it is read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar

from packhorse.plan.run_plan import PlanPart

T = TypeVar("T", bound=PlanPart)


def append_line(file: Path, record: PlanPart) -> None:
    """Adds a line, and waits until it is on disk."""
    with file.open("ab+") as opened:
        # The last line may be torn: what follows must not be torn with it.
        if opened.tell() and not _ends_a_line(file):
            opened.write(b"\n")
        opened.write(record.model_dump_json().encode() + b"\n")
        opened.flush()
        os.fsync(opened.fileno())


def read_lines(file: Path, kind: type[T]) -> list[T]:
    """All lines in order but torn ones; none where there is no such file."""
    found = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else ():
        try:
            found.append(kind.model_validate_json(line))
        except ValueError:  # torn
            continue
    return found


def _ends_a_line(file: Path) -> bool:
    with file.open("rb") as opened:
        opened.seek(-1, os.SEEK_END)
        return opened.read(1) == b"\n"
