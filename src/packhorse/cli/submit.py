"""`packhorse submit` and `packhorse pipeline`: show or submit the jobs of a run or a sweep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from packhorse.cli.show.submission import show_jobs, show_submitted, show_submitted_sweep
from packhorse.cli.show.text import open_console
from packhorse.errors import EXIT_OK, UserError
from packhorse.launching.slurm.client import NoSlurmError, StartEstimate
from packhorse.launching.slurm.submit import PlannedJob, check_jobs
from packhorse.recipe.load import load_recipe
from packhorse.recipe.sweep import is_sweep
from packhorse.workflows.pipeline import pipeline_jobs
from packhorse.workflows.submit_run import (
    Submission,
    SubmitRequest,
    check_submission,
    is_run,
    planned_jobs,
    send_jobs,
    submission,
)
from packhorse.workflows.submit_sweep import Sweep, plan_sweep, send_sweep


def submit(recipe: str, overrides: Sequence[str], dry_run: bool, array: str, **requested: Any) -> int:  # noqa: ANN401
    """Submit a recipe as a new run or as a sweep, or submit an existing run.

    Args:
        recipe: Recipe or run.
        overrides: Overrides of the recipe.
        dry_run: Print the jobs only.
        array: Field to vary, and its values.
        requested: Fields of `SubmitRequest`.

    Raises:
        UserError: The run cannot be submitted; no job has been sent. Or Slurm refuses a job.
    """
    overrides, request = [*overrides, *_sweep_override(array)], SubmitRequest(**requested)
    if not is_run(recipe) and is_sweep(load_recipe(recipe, overrides)):
        return _submit_sweep(recipe, overrides, request, dry_run)
    if request.at_once is not None:
        raise UserError(
            f"--at-once is {request.at_once}, and {recipe} is one run.",
            "--at-once limits the runs of a sweep that run at the same time.",
            "remove it, or vary a field: --array seed=1,2,3.",
        )
    planned = submission(recipe, overrides, request)
    return _show_or_send(planned, planned_jobs(planned), dry_run)


def pipeline(recipe: str, overrides: Sequence[str], dry_run: bool, **requested: Any) -> int:  # noqa: ANN401
    """Submit a recipe with the jobs that follow its training; see `submit`."""
    planned = submission(recipe, overrides, SubmitRequest(**requested))
    return _show_or_send(planned, pipeline_jobs(planned), dry_run)


def _sweep_override(array: str) -> list[str]:
    """Return `seed=1,2,3` as an override of the recipe's `sweep`."""
    key, equals, values = array.partition("=")
    if array and not (key and equals and values):
        raise UserError(
            f"--array is {array}.",
            "--array names the field to vary and its values.",
            "write for example --array seed=1,2,3.",
        )
    return [f"sweep.grid.{key}=[{values}]"] if array else []


def _show_or_send(planned: Submission, jobs: Sequence[PlannedJob], dry_run: bool) -> int:
    console, folder = open_console(), Path(planned.plan.run_folder)
    expected = _expected_starts(console, folder, jobs, dry_run, lambda: check_submission(planned, jobs))
    if expected is not None:
        show_submitted(console, planned, jobs, send_jobs(planned, jobs, expected), expected)
    return EXIT_OK


def _submit_sweep(recipe: str, overrides: Sequence[str], request: SubmitRequest, dry_run: bool) -> int:
    console, sweep = open_console(), plan_sweep(recipe, overrides, request)
    site, jobs = sweep.submissions[0].site, sweep.jobs
    expected = _expected_starts(console, sweep.folder, jobs, dry_run, lambda: check_jobs(site, jobs), sweep)
    if expected is not None:
        show_submitted_sweep(console, sweep, send_sweep(sweep, expected), expected)
    return EXIT_OK


def _expected_starts(
    console: Console,
    folder: Path,
    jobs: Sequence[PlannedJob],
    dry_run: bool,
    check: Callable[[], list[StartEstimate]],
    sweep: Sweep | None = None,
) -> list[StartEstimate] | None:
    """Return when Slurm would start the jobs; None for a dry run. That, and a lack of Slurm, prints the jobs."""
    try:
        if not dry_run:
            return check()
    except NoSlurmError:
        show_jobs(console, folder, jobs, sweep)
        raise
    show_jobs(console, folder, jobs, sweep)
    return None
