"""RUN/metrics.jsonl: one JSON object of figures per line."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from packhorse.durable import replace_file
from packhorse.errors import EXIT_DISK, UserError
from packhorse.track.meter import Figures

METRICS_FILE: Final = "metrics.jsonl"

logger = logging.getLogger(__name__)


class MetricsFile:
    """One JSON object a line, with its `step`; flushed at once, so that a killed run leaves all that it measured.

    JSON has no NaN and no infinity: they stand as the strings "nan", "inf" and "-inf".
    """

    def __init__(self, path: Path, first_step: int) -> None:
        """Opens the file to append, after taking out what will be measured again.

        Args:
            path: RUN/metrics.jsonl.
            first_step: First step that this attempt will log; lines from it on, and a torn last line, are removed.

        Raises:
            UserError: The file cannot be written.
        """
        self._path = path
        try:
            _keep_below(path, first_step)
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise _unwritable(path, error) from error

    def log(self, step: int, figures: Figures) -> None:
        """Writes one line.

        Raises:
            UserError: The disk does not take it.
        """
        try:
            self._file.write(_line(step, figures) + "\n")
            self._file.flush()
        except OSError as error:
            raise _unwritable(self._path, error) from error

    def sync(self) -> None:
        """Waits until what was logged is on disk, so that no checkpoint knows more steps than this file.

        Raises:
            UserError: The disk does not take it.
        """
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise _unwritable(self._path, error) from error

    def close(self) -> None:
        """Closes the file.

        Raises:
            UserError: The disk does not take what `log` could not write either.
        """
        try:
            self._file.close()
        except OSError as error:
            raise _unwritable(self._path, error) from error


def read_metrics(path: Path) -> Iterator[Figures]:
    """Yields the lines of a metrics file, `step` among the keys; a line that is torn is left out.

    Args:
        path: RUN/metrics.jsonl; may be absent or being written to.
    """
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            figures = _parse(line)
            if figures is not None:
                yield figures


def _line(step: int, figures: Figures) -> str:
    values: dict[str, float | str] = {key: v if math.isfinite(v) else str(v) for key, v in figures.items()}
    return json.dumps({"step": step, **values}, allow_nan=False)


def _parse(line: str) -> Figures | None:
    try:
        values: dict[str, Any] = json.loads(line)
        figures = {key: float(value) if isinstance(value, str) else value for key, value in values.items()}
    except (ValueError, AttributeError):
        return None
    return figures if "step" in figures else None


def _keep_below(path: Path, first_step: int) -> None:
    """Rewrites the file with the lines below `first_step`."""
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
        logger.warning("%s: %d unreadable lines were left out (a write was cut short).", path, num_unreadable)
    replace_file(path, "".join(kept))


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"{path} cannot be written: {error.strerror}.",
        "every run keeps its figures there, and a run without a record cannot be judged or resumed.",
        "free space or mend the permissions of that folder, or set runs_folder to another one.",
        exit_code=EXIT_DISK,
    )
