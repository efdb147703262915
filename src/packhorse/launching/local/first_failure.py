"""What the first failing rank of an attempt said last; where no rank came so far, the launcher or the job."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from packhorse.launching.local.failure_logs import read_failures
from packhorse.run_folder.attempts import ended_early, is_cause, read_rank_records
from packhorse.run_folder.folder import relative
from packhorse.run_folder.heartbeat import read_heartbeats
from packhorse.run_folder.layout import JOB_LOGS, LOGS_FOLDER, STDERR_LOG, attempt_name, rank_log_name, rank_record_name

LAST_LINES: Final = 8
READ_BYTES: Final = 16_384
"""A log may be long; its last lines are not."""


@dataclass(frozen=True)
class LogExcerpt:
    """Whose, and what.

    Attributes:
        who: `rank 3`, `accelerate launch`, `the job`.
        file: Where all of it stands, as it would be typed here.
        lines: The last ones.
    """

    who: str
    file: str
    lines: tuple[str, ...]


def first_failure(run_folder: Path, attempt: int | None) -> LogExcerpt | None:
    """The last words of what failed first; None where nothing was said.

    Args:
        run_folder: The run's.
        attempt: Its number; None where none has begun, so that only the job's log can tell.
    """
    logs = run_folder / LOGS_FOLDER / attempt_name(attempt)
    found = None
    if attempt is not None:
        found = _of_record(logs) or _of_killed_rank(logs) or _of_file("accelerate launch", logs / STDERR_LOG)
    jobs = sorted((run_folder / LOGS_FOLDER).glob(JOB_LOGS), key=lambda path: path.stat().st_mtime)
    return found or next((words for file in jobs[-1:] if (words := _of_file("the job", file))), None)


def last_lines(file: Path, count: int = LAST_LINES) -> tuple[str, ...]:
    """The last lines of a log that are not empty; none where there is no such file."""
    if not file.is_file():
        return ()
    with file.open("rb") as opened:
        opened.seek(max(0, file.stat().st_size - READ_BYTES))
        lines = opened.read().decode(errors="replace").splitlines()
    return tuple(line.rstrip() for line in lines if line.strip())[-count:]


def _of_record(logs: Path) -> LogExcerpt | None:
    left = [record for record in read_rank_records(logs) if ended_early(record) and record["message"]]
    if not left:
        return None
    first = next(filter(is_cause, left), left[0])
    lines = [line for line in first["message"].splitlines() if line.strip()]
    return LogExcerpt(
        f"rank {first['rank']}", relative(logs / rank_record_name(first["rank"])), tuple(lines[-LAST_LINES:])
    )


def _of_killed_rank(logs: Path) -> LogExcerpt | None:
    """A rank that a signal ended left no record; torch's agent tells its process."""
    for failure in read_failures(logs):
        beat = next((beat for beat in read_heartbeats(logs) if failure.pid in (beat.pid, None)), None)
        if beat is not None:
            log = logs / rank_log_name(beat.rank)
            return LogExcerpt(
                f"rank {beat.rank}", relative(log), (*last_lines(log, LAST_LINES - 1), f"it {failure.cause}")
            )
    return None


def _of_file(who: str, file: Path) -> LogExcerpt | None:
    lines = last_lines(file)
    return LogExcerpt(who, relative(file), lines) if lines else None
