"""What the first failing rank of an attempt said last; where no rank came so far, the launcher or the job."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from packhorse.launching.local.agent import STDERR_LOG, failures
from packhorse.run_folder.folder import relative
from packhorse.run_folder.heartbeat import read_heartbeats
from packhorse.run_folder.rank_records import is_cause, left_others, read_records

LAST_LINES: Final = 8
READ_BYTES: Final = 16_384
"""A log may be long; its last lines are not."""


@dataclass(frozen=True)
class LastWords:
    """Whose, and what.

    Attributes:
        who: `rank 3`, `accelerate launch`, `the job`.
        file: Where all of it stands, as it would be typed here.
        lines: The last ones.
    """

    who: str
    file: str
    lines: tuple[str, ...]


def first_failure(run_folder: Path, attempt: int | None) -> LastWords | None:
    """The last words of what failed first; None where nothing was said.

    Args:
        run_folder: The run's.
        attempt: Its number; None where none has begun, so that only the job's log can tell.
    """
    logs = run_folder / "logs" / f"attempt-{attempt}"
    found = None
    if attempt is not None:
        found = _of_record(logs) or _of_killed_rank(logs) or _of_file("accelerate launch", logs / STDERR_LOG)
    jobs = sorted((run_folder / "logs").glob("*.out"), key=lambda path: path.stat().st_mtime)
    return found or next((words for file in jobs[-1:] if (words := _of_file("the job", file))), None)


def last_lines(file: Path, count: int = LAST_LINES) -> tuple[str, ...]:
    """The last lines of a log that are not empty; none where there is no such file."""
    if not file.is_file():
        return ()
    with file.open("rb") as opened:
        opened.seek(max(0, file.stat().st_size - READ_BYTES))
        lines = opened.read().decode(errors="replace").splitlines()
    return tuple(line.rstrip() for line in lines if line.strip())[-count:]


def _of_record(logs: Path) -> LastWords | None:
    left = [record for record in read_records(logs) if left_others(record) and record["message"]]
    if not left:
        return None
    first = next(filter(is_cause, left), left[0])
    lines = [line for line in first["message"].splitlines() if line.strip()]
    return LastWords(f"rank {first['rank']}", relative(logs / f"rank-{first['rank']}.json"), tuple(lines[-LAST_LINES:]))


def _of_killed_rank(logs: Path) -> LastWords | None:
    """A rank that a signal ended left no record; torch's agent tells its process."""
    for failure in failures(logs):
        beat = next((beat for beat in read_heartbeats(logs) if failure.pid in (beat.pid, None)), None)
        if beat is not None:
            log = logs / f"rank-{beat.rank}.log"
            return LastWords(
                f"rank {beat.rank}", relative(log), (*last_lines(log, LAST_LINES - 1), f"it {failure.cause}")
            )
    return None


def _of_file(who: str, file: Path) -> LastWords | None:
    lines = last_lines(file)
    return LastWords(who, relative(file), lines) if lines else None
