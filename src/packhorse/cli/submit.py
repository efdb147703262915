"""`packhorse submit` and `packhorse pipeline`: show or submit the jobs of a run or a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from packhorse.cli.show.submission import show_jobs, show_submitted, show_submitted_sweep
from packhorse.cli.show.text import open_console
from packhorse.errors import EXIT_OK, UserError
from packhorse.launching.slurm.client import NoSlurmError
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
from packhorse.workflows.submit_sweep import plan_sweep, send_sweep


def submit(
    recipe: str,
    overrides: Sequence[str],
    nodes: int | None,
    gpus_per_node: int | None,
    site: str,
    time: str,
    dry_run: bool,
    force: bool,
    array: str,
    at_once: int | None,
) -> int:
    """Submit a recipe as a new run or as a sweep, or submit an existing run.

    Raises:
        UserError: The run cannot be submitted; no job has been sent. Or Slurm refuses a job.
    """
    overrides = [*overrides, *_sweep_override(array)]
    request = SubmitRequest(nodes, gpus_per_node, site, time, force, at_once)
    if not is_run(recipe) and is_sweep(load_recipe(recipe, overrides)):
        return _submit_sweep(recipe, overrides, request, dry_run)
    if at_once is not None:
        raise UserError(
            f"--at-once is {at_once}, and {recipe} is one run.",
            "--at-once limits the runs of a sweep that run at the same time.",
            "remove it, or vary a field: --array seed=1,2,3.",
        )
    planned = submission(recipe, overrides, request)
    return _show_or_send(planned, planned_jobs(planned), dry_run)


def pipeline(
    recipe: str,
    overrides: Sequence[str],
    nodes: int | None,
    gpus_per_node: int | None,
    site: str,
    time: str,
    dry_run: bool,
    force: bool,
) -> int:
    """Submit a recipe with the jobs that follow its training.

    Raises:
        UserError: The run cannot be submitted; no job has been sent. Or Slurm refuses a job.
    """
    planned = submission(recipe, overrides, SubmitRequest(nodes, gpus_per_node, site, time, force))
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
    if dry_run:
        show_jobs(console, folder, jobs)
        return EXIT_OK
    try:
        expected = check_submission(planned, jobs)
    except NoSlurmError:
        show_jobs(console, folder, jobs)
        raise
    records = send_jobs(planned, jobs, expected)
    show_submitted(console, planned, jobs, records, expected)
    return EXIT_OK


def _submit_sweep(recipe: str, overrides: Sequence[str], request: SubmitRequest, dry_run: bool) -> int:
    console, sweep = open_console(), plan_sweep(recipe, overrides, request)
    if dry_run:
        show_jobs(console, sweep.folder, sweep.jobs, sweep)
        return EXIT_OK
    try:
        expected = check_jobs(sweep.submissions[0].site, sweep.jobs)
    except NoSlurmError:
        show_jobs(console, sweep.folder, sweep.jobs, sweep)
        raise
    records = send_sweep(sweep, expected)
    show_submitted_sweep(console, sweep, records, expected)
    return EXIT_OK
