"""Read from an attempt's logs why a rank failed.

Exit codes and signals of ranks do not reach the launcher: accelerate, torch's agent and Slurm only log them in
stderr.log.
"""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from packhorse.run_folder.attempts import ended_early, is_cause, read_rank_records
from packhorse.run_folder.folder import relative
from packhorse.run_folder.heartbeat import read_heartbeats
from packhorse.run_folder.layout import RANK_LOGS, RANK_RECORDS, STDERR_LOG, attempt_logs, job_logs, numbered

# torch/distributed/elastic/multiprocessing: api.py logs a failure at once, errors/__init__.py all failures at the end
AGENT: Final = re.compile(r"(?:failed \(exitcode: (-?\d+)\) local_rank: \d+|exitcode  : (-?\d+)) \(pid: (\d+)\)")
# subprocess.CalledProcessError, which accelerate raises for a single process
SINGLE: Final = re.compile(r"(?:died with <Signals\.\w+: (\d+)>|returned non-zero exit status (\d+))")
# slurmstepd, by its own measurement (jobacct_gather) or by that of a cgroup (task/cgroup)
OVER_LIMIT: Final = re.compile(r"exceeded memory limit \((\d+) > (\d+)\)|oom[-_]kill event")
LAST_LINES: Final = 8
READ_BYTES: Final = 16_384
"""Bytes read from the end of a log, which may be long."""


@dataclass(frozen=True)
class ProcessFailure:
    """A process that failed.

    Attributes:
        pid: Number of the process; None if it was the only one.
        exit_code: As in `subprocess`: a negative number is the signal that killed it.
    """

    pid: int | None
    exit_code: int

    @property
    def cause(self) -> str:
        """How the process ended, as a phrase."""
        if self.exit_code < 0:
            return f"was killed by {signal.Signals(-self.exit_code).name}"
        return f"ended without a message, with exit code {self.exit_code}"


@dataclass(frozen=True)
class LogExcerpt:
    """The last lines of a log.

    Attributes:
        who: Its writer: `rank 3`, `accelerate launch`, `the job`.
        file: Path of the log, relative to the current directory if it is inside.
        lines: The lines.
    """

    who: str
    file: str
    lines: tuple[str, ...]


def find_first_failure(run_folder: Path, attempt: int | None) -> LogExcerpt | None:
    """Return the last lines of the rank that failed first, else of the launcher, else of the job; None without any.

    Args:
        run_folder: Folder of the run.
        attempt: Number of the attempt; None if none has begun, so that only the job has a log.
    """
    excerpt = None
    if attempt is not None:
        logs = attempt_logs(run_folder, attempt)
        excerpt = _of_record(logs) or _of_killed_rank(logs) or _of_file("accelerate launch", logs / STDERR_LOG)
    return excerpt or next((_of_file("the job", file) for file in job_logs(run_folder)[-1:]), None)


def last_lines(file: Path, count: int = LAST_LINES) -> tuple[str, ...]:
    """Return the last lines of a log that are not empty; none if the file is missing."""
    if not file.is_file():
        return ()
    with file.open("rb") as opened:
        opened.seek(max(0, file.stat().st_size - READ_BYTES))
        lines = opened.read().decode(errors="replace").splitlines()
    return tuple(line.rstrip() for line in lines if line.strip())[-count:]


def memory_limit_note(logs: Path) -> str:
    """Return a note for a failure message if Slurm killed ranks for their host memory; empty otherwise."""
    match = OVER_LIMIT.search(_stderr(logs))
    if match is None:
        return ""
    taken, limit = (f"{int(number or 0) / 2**20:,.0f} MiB" for number in match.groups())
    figures = f"{taken} on a node, and its limit is {limit}" if match[1] else "over its limit"
    return f"; the job's host memory was {figures}: raise memory_per_gpu or memory_per_node of the site (sbatch --mem)"


def read_failures(logs: Path) -> list[ProcessFailure]:
    """Return the failures in an attempt's stderr.log, in order."""
    text = _stderr(logs)
    of_agent = [ProcessFailure(int(pid), int(early or late)) for early, late, pid in AGENT.findall(text)]
    single = [ProcessFailure(None, -int(number) if number else int(code)) for number, code in SINGLE.findall(text)]
    return of_agent + single


def find_failure(logs: Path, pid: int) -> ProcessFailure | None:
    """Return how the process of a rank failed; None if stderr.log does not say so, or not yet."""
    return next((failure for failure in read_failures(logs) if failure.pid in (pid, None)), None)


def _of_record(logs: Path) -> LogExcerpt | None:
    failed = [record for record in read_rank_records(logs) if ended_early(record) and record["message"]]
    if not failed:
        return None
    first = next(filter(is_cause, failed), failed[0])
    lines = [line for line in first["message"].splitlines() if line.strip()]
    return LogExcerpt(
        f"rank {first['rank']}", relative(logs / numbered(RANK_RECORDS, first["rank"])), tuple(lines[-LAST_LINES:])
    )


def _of_killed_rank(logs: Path) -> LogExcerpt | None:
    """Return the last lines of a rank that a signal killed: it left no record, but torch's agent logs its process."""
    for failure in read_failures(logs):
        beat = next((beat for beat in read_heartbeats(logs) if failure.pid in (beat.pid, None)), None)
        if beat is not None:
            log = logs / numbered(RANK_LOGS, beat.rank)
            lines = (*last_lines(log, LAST_LINES - 1), f"it {failure.cause}")
            return LogExcerpt(f"rank {beat.rank}", relative(log), lines)
    return None


def _of_file(who: str, file: Path) -> LogExcerpt | None:
    lines = last_lines(file)
    return LogExcerpt(who, relative(file), lines) if lines else None


def _stderr(logs: Path) -> str:
    try:
        return (logs / STDERR_LOG).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
