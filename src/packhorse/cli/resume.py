"""`packhorse resume RUN`."""

from __future__ import annotations

from collections.abc import Sequence

from packhorse.cli.prepare import prepare_with_progress
from packhorse.cli.show.text import print_plain
from packhorse.cli.train import show_end, show_sweep_end, terminal_reporter
from packhorse.errors import EXIT_OK
from packhorse.run_folder.folder import relative
from packhorse.run_folder.layout import RECIPE_FILE
from packhorse.run_folder.sweep import find_sweep
from packhorse.workflows import resume_run
from packhorse.workflows.new_run import RunEnd
from packhorse.workflows.train_sweep import train_sweep


def resume(run: str, overrides: Sequence[str], gpus: int | None, restarts: int | None, force: bool) -> int:
    """Resume a run or a sweep on this machine, or submit its unfinished jobs again and print them."""
    sweep = find_sweep(run)
    if sweep is not None and (sweep / RECIPE_FILE).is_file():
        recipe = str(sweep / RECIPE_FILE)
        return show_sweep_end(
            train_sweep(recipe, overrides, gpus, restarts, force, prepare_with_progress, terminal_reporter())
        )
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
