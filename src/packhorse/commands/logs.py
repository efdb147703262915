"""`packhorse logs RUN`: what a run's newest attempt said; imports no torch."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from packhorse.commands.status import is_under_way
from packhorse.errors import EXIT_OK, UserError
from packhorse.run_folder.folder import open_run, relative
from packhorse.run_folder.layout import ATTEMPT_FOLDERS, JOB_LOGS, LOGS_FOLDER, RANK_LOGS, STDERR_LOG, numbered

LOOK_SECONDS: Final = 0.5
OVER_SECONDS: Final = 5.0
"""Between two questions whether the run goes on: where a job runs it, Slurm is asked."""


def logs(run: str, rank: int | None = None, follow: bool = False) -> int:
    """Prints what the job and the launcher said of a run, and its rank 0; or what one rank said.

    Args:
        run: Name or folder of the run.
        rank: This rank alone.
        follow: Go on with what is added, also by a later attempt, until the run ends.

    Raises:
        UserError: There is no such run, or it said nothing yet, or has no such rank.
    """
    folder = Path(open_run(run).run_folder)
    files = log_files(folder, rank)
    if not files and not (follow and is_under_way(folder)):
        raise _nothing(folder, rank)
    printed = Printed(headed=rank is None)
    printed.print_new(files)
    looked = time.monotonic()
    while follow:
        time.sleep(LOOK_SECONDS)
        over = False
        if time.monotonic() - looked >= OVER_SECONDS:
            looked, over = time.monotonic(), not is_under_way(folder)
        # After the question: what was said until the end is printed too.
        printed.print_new(log_files(folder, rank))
        if over:
            break
    return EXIT_OK


def log_files(folder: Path, rank: int | None) -> list[Path]:
    """The newest job's log, and of the newest attempt the launcher's and rank 0's; of a rank just its own."""
    attempts = sorted(
        (folder / LOGS_FOLDER).glob(ATTEMPT_FOLDERS), key=lambda path: int(path.name.removeprefix("attempt-"))
    )
    if rank is not None:
        return [file for attempt in attempts[-1:] if (file := attempt / numbered(RANK_LOGS, rank)).is_file()]
    jobs = sorted((folder / LOGS_FOLDER).glob(JOB_LOGS), key=lambda path: path.stat().st_mtime)
    of_attempt = [attempt / name for attempt in attempts[-1:] for name in (STDERR_LOG, numbered(RANK_LOGS, 0))]
    return [file for file in [*jobs[-1:], *of_attempt] if file.is_file() and file.stat().st_size]


class Printed:
    """What of each file is printed already; files have a head, as `tail` gives them, where there are several."""

    def __init__(self, headed: bool) -> None:
        self._headed = headed
        self._last: Path | None = None
        self._upto: dict[Path, int] = {}

    def print_new(self, files: list[Path]) -> None:
        """Prints what was added to files since the last time."""
        for file in files:
            with file.open("rb") as opened:
                opened.seek(self._upto.get(file, 0))
                said = opened.read()
                self._upto[file] = opened.tell()
            if said:
                sys.stdout.write("".join(self._head(file)) + said.decode(errors="replace"))
        sys.stdout.flush()

    def _head(self, file: Path) -> Iterator[str]:
        if file != self._last and self._headed:
            yield ("\n" if self._last else "") + f"==> {relative(file)} <==\n"
        self._last = file


def _nothing(folder: Path, rank: int | None) -> UserError:
    found = sorted(int(file.stem.removeprefix("rank-")) for file in (folder / LOGS_FOLDER).glob(f"*/{RANK_LOGS}"))
    if rank is not None and found:
        return UserError(
            f"rank {rank} of {relative(folder)} has no log in its newest attempt.",
            f"ranks 0 to {found[-1]} have one.",
            f"give one of these, for example --rank {found[-1]}.",
        )
    return UserError(
        f"{relative(folder)} has no log yet.",
        "a run speaks once a launcher or a job has started it.",
        f"see `packhorse status {relative(folder)}` for where it stands.",
    )
