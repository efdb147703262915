"""`packhorse cancel RUN`."""

from __future__ import annotations

from packhorse.cli.show.text import print_plain
from packhorse.errors import EXIT_OK
from packhorse.workflows import cancel_run


def cancel(run: str, now: bool = False) -> int:
    """Stop a run, or all runs of a sweep, and print what was done."""
    for line in cancel_run.cancel(run, now):
        print_plain(line)
    return EXIT_OK
