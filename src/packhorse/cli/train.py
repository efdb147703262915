"""`packhorse train`: train a recipe on this machine."""

from __future__ import annotations

from collections.abc import Sequence

from packhorse.cli.prepare import prepare_with_progress
from packhorse.cli.show.sweep import show_sweep
from packhorse.cli.show.text import open_console, print_plain
from packhorse.errors import EXIT_OK
from packhorse.recipe.load import load_recipe
from packhorse.recipe.sweep import is_sweep
from packhorse.run_folder.folder import relative
from packhorse.workflows import new_run, resume_run
from packhorse.workflows.new_run import Reporter, RunEnd
from packhorse.workflows.submit_run import is_run
from packhorse.workflows.train_sweep import SweepEnd, train_sweep


def train(
    recipe: str,
    overrides: Sequence[str] = (),
    gpus: int | None = None,
    resume: bool = False,
    restarts: int | None = None,
    force: bool = False,
) -> int:
    """Prepare the data of a recipe and train, or train all runs of its sweep; or resume a run on this machine.

    Raises:
        UserError: The run cannot start; no device has been taken.
    """
    if not resume and not is_run(recipe) and is_sweep(load_recipe(recipe, overrides)):
        return show_sweep_end(
            train_sweep(recipe, overrides, gpus, restarts, force, prepare_with_progress, terminal_reporter())
        )
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


def show_sweep_end(end: SweepEnd) -> int:
    """Print the table of a sweep, its failed runs and what to do next; return the exit code."""
    console, folder = open_console(), relative(end.folder)
    show_sweep(end.folder, console)
    for name, message in end.failures.items():
        print_plain(f"{name} is not finished: {message.splitlines()[0]}", open_console(stderr=True))
    if end.num_finished < end.num_runs:
        left = end.num_runs - end.num_finished
        print_plain(f"{left} of {end.num_runs} runs are not finished; next: packhorse resume {folder}", console)
    else:
        print_plain(f"done: {folder}; next: packhorse evaluate {folder}", console)
    return end.exit_code


def show_end(end: RunEnd) -> int:
    """Print how a run ended; return its exit code."""
    if end.message:
        print_plain(end.message, open_console(stderr=True))
    if end.exit_code == EXIT_OK and end.plan is not None:
        folder = relative(end.plan.run_folder)
        print_plain(f"done: {folder}; next: packhorse evaluate {folder}")
    return end.exit_code
