"""`packhorse resume RUN`."""

from __future__ import annotations

from collections.abc import Sequence

from packhorse.cli.show.text import print_plain
from packhorse.cli.train import show_end, terminal_reporter
from packhorse.errors import EXIT_OK
from packhorse.run_folder.folder import relative
from packhorse.workflows import resume_run
from packhorse.workflows.new_run import RunEnd


def resume(run: str, overrides: Sequence[str], gpus: int | None, restarts: int | None, force: bool) -> int:
    """Resume a run on this machine, or submit its unfinished jobs again and print them."""
    resumed = resume_run.resume(run, overrides, gpus, restarts, force, terminal_reporter())
    if isinstance(resumed, RunEnd):
        return show_end(resumed)
    for folder, record in resumed.jobs:
        after = f", after job {record.depends_on[-1]} has succeeded" if record.depends_on else ""
        print_plain(f"{relative(folder)}: job {record.job_id} {record.kind}{after}")
    for count, what in ((resumed.num_finished, "are finished already"), (resumed.num_live, "wait or run")):
        if count:
            print_plain(f"runs that {what}: {count}")
    return EXIT_OK
