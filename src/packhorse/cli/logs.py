"""`packhorse logs RUN`: logs of a run's newest attempt. Imports no torch."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from packhorse.errors import EXIT_OK, UserError
from packhorse.run_folder.folder import open_run, relative
from packhorse.run_folder.layout import (
    LOGS_FOLDER,
    RANK_LOGS,
    STDERR_LOG,
    attempt_logs,
    attempt_numbers,
    job_logs,
    numbered,
)
from packhorse.workflows.run_state import is_under_way

LOOK_SECONDS: Final = 0.5
OVER_SECONDS: Final = 5.0
"""Time between two looks whether the run is over: for a job, each look asks Slurm."""


def logs(run: str, rank: int | None = None, follow: bool = False) -> int:
    """Print the logs of the job, the launcher and rank 0, or of one rank; with `follow`, until the run ends.

    Raises:
        UserError: There is no such run, it has no log yet, or has no such rank.
    """
    folder = Path(open_run(run).run_folder)
    files = log_files(folder, rank)
    if not files and not (follow and is_under_way(folder)):
        raise _no_log(folder, rank)
    printer = LogPrinter(with_headers=rank is None)
    printer.print_new(files)
    looked = time.monotonic()
    while follow:
        time.sleep(LOOK_SECONDS)
        over = False
        if time.monotonic() - looked >= OVER_SECONDS:
            looked, over = time.monotonic(), not is_under_way(folder)
        # After the look: lines written before the end are printed, too.
        printer.print_new(log_files(folder, rank))
        if over:
            break
    return EXIT_OK


def log_files(folder: Path, rank: int | None) -> list[Path]:
    """Return the logs of the newest job, and of the newest attempt's launcher and rank 0; or the log of one rank."""
    attempts = [attempt_logs(folder, number) for number in attempt_numbers(folder)[-1:]]
    if rank is not None:
        return [file for attempt in attempts if (file := attempt / numbered(RANK_LOGS, rank)).is_file()]
    of_attempt = [attempt / name for attempt in attempts for name in (STDERR_LOG, numbered(RANK_LOGS, 0))]
    return [file for file in [*job_logs(folder)[-1:], *of_attempt] if file.is_file() and file.stat().st_size]


class LogPrinter:
    """Prints what is new in files; with several files, each part has a header as `tail` prints it."""

    def __init__(self, with_headers: bool) -> None:
        self._with_headers = with_headers
        self._last: Path | None = None
        self._printed_bytes: dict[Path, int] = {}

    def print_new(self, files: list[Path]) -> None:
        """Print what was added to the files since the last call."""
        for file in files:
            with file.open("rb") as opened:
                opened.seek(self._printed_bytes.get(file, 0))
                added = opened.read()
                self._printed_bytes[file] = opened.tell()
            if added:
                sys.stdout.write("".join(self._header(file)) + added.decode(errors="replace"))
        sys.stdout.flush()

    def _header(self, file: Path) -> Iterator[str]:
        if file != self._last and self._with_headers:
            yield ("\n" if self._last else "") + f"==> {relative(file)} <==\n"
        self._last = file


def _no_log(folder: Path, rank: int | None) -> UserError:
    ranks = sorted(int(file.stem.removeprefix("rank-")) for file in (folder / LOGS_FOLDER).glob(f"*/{RANK_LOGS}"))
    if rank is not None and ranks:
        return UserError(
            f"rank {rank} of {relative(folder)} has no log in its newest attempt.",
            f"ranks 0 to {ranks[-1]} have one.",
            f"name one of these, for example --rank {ranks[-1]}.",
        )
    return UserError(
        f"{relative(folder)} has no log yet.",
        "a run has logs once a launcher or a job has started it.",
        f"see `packhorse status {relative(folder)}`.",
    )
