"""What the kernel says of a process of this host: whether it is there, whether it is stopped, and since when."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

GONE = "ZX"  # ended, and its parent has not asked yet (proc(5))
STOPPED = "Tt"  # by SIGSTOP, or by a debugger


@dataclass(frozen=True)
class Process:
    """A process that exists.

    Attributes:
        state: One letter, as in proc(5): R runs, S sleeps, D waits for a disk, T is stopped.
        started: Clock ticks from the start of the machine to its own; tells it from a later process of its number.
    """

    state: str
    started: int


def process(pid: int) -> Process | None:
    """The process of this number on this host; None where it has ended."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text[text.rindex(")") + 1 :].split()  # its name stands in brackets, and may hold anything
    return None if fields[0] in GONE else Process(fields[0], int(fields[19]))


def identity(pid: int) -> str:
    """A process by its number and start, as it can be handed on in an environment variable; empty where it ended."""
    found = process(pid)
    return f"{pid}:{found.started}" if found else ""
