"""`packhorse train`: train a recipe on this machine."""

from __future__ import annotations

from collections.abc import Sequence

from packhorse.cli.prepare import prepare_with_progress
from packhorse.cli.show.text import open_console, print_plain
from packhorse.errors import EXIT_OK
from packhorse.run_folder.folder import relative
from packhorse.workflows import new_run, resume_run
from packhorse.workflows.new_run import Reporter, RunEnd


def train(
    recipe: str,
    overrides: Sequence[str] = (),
    gpus: int | None = None,
    resume: bool = False,
    restarts: int | None = None,
    force: bool = False,
) -> int:
    """Prepare the data of a recipe and train; or resume a run on this machine.

    Raises:
        UserError: The run cannot start; no device has been taken.
    """
    if resume:
        return show_end(resume_run.resume_here(recipe, overrides, gpus, restarts, force, terminal_reporter()))
    return show_end(
        new_run.train(
            new_run.load_single(recipe, overrides),
            gpus,
            restarts,
            force,
            prepare_with_progress,
            terminal_reporter(),
        )
    )


def terminal_reporter() -> Reporter:
    """Return a reporter that prints progress to stdout, and failures and restarts to stderr."""
    console, errors = open_console(), open_console(stderr=True)
    return Reporter(
        info=lambda line: console.print(line, soft_wrap=True, highlight=False, markup=False, style="dim"),
        warn=lambda line: print_plain(line, errors),
    )


def show_end(end: RunEnd) -> int:
    """Print how a run ended; return its exit code."""
    if end.message:
        print_plain(end.message, open_console(stderr=True))
    if end.exit_code == EXIT_OK and end.plan is not None:
        folder = relative(end.plan.run_folder)
        print_plain(f"done: {folder}; next: packhorse evaluate {folder}")
    return end.exit_code
