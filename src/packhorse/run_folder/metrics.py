"""RUN/metrics.jsonl: one JSON object per logged step, with its `step`.

JSON has no NaN and no infinity: they are written as the strings "nan", "inf" and "-inf".
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from packhorse.durable import replace_file
from packhorse.errors import EXIT_DISK, UserError

logger = logging.getLogger(__name__)

TAIL_BYTES: Final = (2**16, 2**20)
"""How much of the end of a file `read_last` reads: first a little, then more if a key is missing."""


class MetricsFile:
    """Writes metrics; every line is flushed at once, so that a killed run keeps all that it measured.

    Every method raises a UserError if the disk refuses.
    """

    def __init__(self, path: Path, first_step: int) -> None:
        """Open the file to append, after removing the lines of steps that will be measured again.

        Args:
            path: RUN/metrics.jsonl.
            first_step: First step that this attempt logs; lines from this step on and a torn last line are removed.
        """
        self._path = path
        with _disk_errors(path):
            _keep_below(path, first_step)
            self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Write one line."""
        values: dict[str, float | str] = {key: v if math.isfinite(v) else str(v) for key, v in figures.items()}
        with _disk_errors(self._path):
            self._file.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
            self._file.flush()

    def sync(self) -> None:
        """Wait until what was logged is on disk, so that no checkpoint is ahead of this file."""
        with _disk_errors(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Write what `log` could not write, and close the file."""
        with _disk_errors(self._path):
            self._file.close()


def read_metrics(path: Path) -> Iterator[dict[str, float]]:
    """Yield the lines of a metrics file, with `step` among the keys; a torn line is skipped.

    Args:
        path: RUN/metrics.jsonl; it may be absent, or still growing.
    """
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            figures = _parse(line)
            if figures is not None:
                yield figures


def read_last(path: Path, keys: Sequence[str]) -> dict[str, float]:
    """Return the last value of each key, from the end of the file: of a long file only the last MiB is read.

    Args:
        path: RUN/metrics.jsonl; it may be absent, damaged, or still growing.
        keys: Metric keys; one without a value there is missing in the result.
    """
    if not path.is_file():
        return {}
    found: dict[str, float] = {}
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        for length in TAIL_BYTES:
            file.seek(max(0, size - length))
            tail = file.read()
            found = {key: value for key in keys if (value := _last_value(tail, key)) is not None}
            if len(found) == len(keys) or length >= size:
                break
    return found


def _last_value(tail: bytes, key: str) -> float | None:
    """Return the last number of a key; lines that cannot be read, as the first of a tail, are skipped."""
    end, name = len(tail), f'"{key}"'.encode()
    while (at := tail.rfind(name, 0, end)) >= 0:
        start = tail.rfind(b"\n", 0, at) + 1
        stop = tail.find(b"\n", at)
        figures = _parse(tail[start : stop if stop >= 0 else None].decode(errors="replace")) or {}
        value = figures.get(key)
        if isinstance(value, (int, float)):
            return float(value)
        end = start
    return None


def _parse(line: str) -> dict[str, float] | None:
    try:
        values: dict[str, float | str] = json.loads(line)
        figures = {key: float(value) if isinstance(value, str) else value for key, value in values.items()}
    except (ValueError, AttributeError):
        return None
    return figures if "step" in figures else None


def _keep_below(path: Path, first_step: int) -> None:
    """Rewrite the file with the lines below `first_step`."""
    if not path.is_file():
        return
    kept: list[str] = []
    num_unreadable = 0
    for line in path.read_text(encoding="utf-8").split("\n"):
        figures = _parse(line) if line else None
        num_unreadable += bool(line) and figures is None
        if figures is not None and figures["step"] < first_step:
            kept.append(line + "\n")
    if num_unreadable:
        logger.warning("%s: removed %d unreadable lines (a write was cut short).", path, num_unreadable)
    replace_file(path, "".join(kept))


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror}.",
            "every run keeps its metrics there; a run without them cannot be judged or resumed.",
            "free space or fix the permissions of that folder, or set runs_folder to another one.",
            exit_code=EXIT_DISK,
        ) from error
