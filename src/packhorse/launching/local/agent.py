"""What the processes between us and the ranks wrote of ranks that failed: accelerate, torch's agent, and Slurm.

Exit codes do not survive them, and a signal that killed a rank is told nowhere else.
"""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass
from pathlib import Path

from packhorse.run_folder.layout import STDERR_LOG

# torch/distributed/elastic/multiprocessing: api.py at once, and errors/__init__.py of all that failed, in the end
AGENT = re.compile(r"(?:failed \(exitcode: (-?\d+)\) local_rank: \d+|exitcode  : (-?\d+)) \(pid: (\d+)\)")
# subprocess.CalledProcessError, which accelerate raises of a single process
SINGLE = re.compile(r"(?:died with <Signals\.\w+: (\d+)>|returned non-zero exit status (\d+))")
# slurmstepd, by its own measure (jobacct_gather) or by that of a cgroup (task/cgroup)
OVER_LIMIT = re.compile(r"exceeded memory limit \((\d+) > (\d+)\)|oom[-_]kill event")


@dataclass(frozen=True)
class Failure:
    """A process that failed.

    Attributes:
        pid: Its number; None where it was the only one.
        exit_code: As in `subprocess`: below 0, the signal that killed it.
    """

    pid: int | None
    exit_code: int

    @property
    def cause(self) -> str:
        """What became of it, in words."""
        if self.exit_code < 0:
            return f"was killed by {signal.Signals(-self.exit_code).name}"
        return f"ended without a word, with exit code {self.exit_code}"


def memory_limit_note(logs: Path) -> str:
    """Why Slurm killed ranks, where it was for their host memory; empty where it was not."""
    found = OVER_LIMIT.search(_said(logs))
    if found is None:
        return ""
    taken, limit = (f"{int(number or 0) / 2**20:,.0f} MiB" for number in found.groups())
    figures = f"{taken} on a node, and its limit is {limit}" if found[1] else "over its limit"
    return f"; the job's host memory was {figures}: raise memory_per_gpu or memory_per_node of the site (sbatch --mem)"


def failures(logs: Path) -> list[Failure]:
    """What stands of failures in an attempt's stderr.log, in order; empty where nothing does, or not yet."""
    text = _said(logs)
    found = [Failure(int(pid), int(early or late)) for early, late, pid in AGENT.findall(text)]
    return found + [Failure(None, -int(number) if number else int(code)) for number, code in SINGLE.findall(text)]


def find_failure(logs: Path, pid: int) -> Failure | None:
    """What became of one rank; None where it is not told, or not yet."""
    return next((failure for failure in failures(logs) if failure.pid in (pid, None)), None)


def _said(logs: Path) -> str:
    try:
        return (logs / STDERR_LOG).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
