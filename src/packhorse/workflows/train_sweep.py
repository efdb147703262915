"""Train the runs of a sweep on this machine, one after the other; the same command again trains what is left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from packhorse.data.content_key import find_prepared
from packhorse.errors import EXIT_OK, EXIT_STOPPED, UserError
from packhorse.plan.make_plan import run_folder_of
from packhorse.recipe.load import dump_recipe, load_recipe
from packhorse.recipe.schema import Recipe
from packhorse.recipe.sweep import SweepRun, expand
from packhorse.run_folder.folder import check_free, relative
from packhorse.run_folder.layout import PLAN_FILE, RECIPE_FILE, SWEEP_FILE
from packhorse.run_folder.status import read_status
from packhorse.run_folder.sweep import create_sweep
from packhorse.workflows.early_checks import check_start
from packhorse.workflows.new_run import Reporter, RunEnd, train
from packhorse.workflows.prepare import Prepare, manifest_of_prepared
from packhorse.workflows.resume_run import resume_here


@dataclass(frozen=True)
class SweepEnd:
    """How the runs of a sweep on this machine ended.

    Attributes:
        folder: Folder of the sweep.
        num_runs: Number of its runs.
        num_finished: Runs that are finished, now or before.
        failures: Name of each run that failed or could not start, and why.
        exit_code: 0 if all runs are finished, 75 if the sweep was stopped, else that of the first failure.
    """

    folder: Path
    num_runs: int
    num_finished: int
    failures: dict[str, str]
    exit_code: int


def train_sweep(
    recipe: str,
    overrides: Sequence[str] = (),
    gpus: int | None = None,
    restarts: int | None = None,
    force: bool = False,
    prepare: Prepare = manifest_of_prepared,
    reporter: Reporter = Reporter(),  # noqa: B008
) -> SweepEnd:
    """Train the runs of a sweep that are not finished: interrupted and failed ones are resumed, new ones created.

    A run that fails does not end the sweep; a stop does.

    Args:
        recipe: Name or path of a recipe with a sweep.
        overrides: Overrides of the recipe.
        gpus: Number of processes of each run, one per GPU; None takes the recipe's, or those of the machine.
        restarts: Attempts of each run that may follow a failed one; None takes the recipe's.
        force: Whether to run even if the GPUs cannot hold the plan.
        prepare: Prepares the data of a run if it is not prepared.
        reporter: Where progress is reported.

    Raises:
        UserError: A run has mistakes or its rows cannot be prepared, or the folder holds another sweep; nothing is
            trained.
    """
    loaded = load_recipe(recipe, overrides)
    folder, runs = run_folder_of(loaded), expand(loaded)
    _open_sweep(folder, recipe, loaded, runs, prepare)
    failures: dict[str, str] = {}
    codes: list[int] = []
    for run in runs:
        run_folder = folder.with_name(run.recipe.name)
        status = read_status(run_folder)
        if status is not None and status.state == "finished":
            continue
        reporter.info(f"run {run.number} of {len(runs)}, {run.recipe.name}: {' '.join(run.overrides)}")
        try:
            if (run_folder / PLAN_FILE).is_file():
                end = resume_here(str(run_folder), (), gpus, restarts, force, reporter)
            else:
                end = train(run.recipe, gpus, restarts, force, prepare, reporter)
        except UserError as error:
            end = RunEnd(None, error.exit_code, str(error))
        if end.exit_code == EXIT_OK:
            continue
        codes.append(end.exit_code)
        failures[run.recipe.name] = end.message
        reporter.warn(f"{run.recipe.name}: {end.message}")
        if end.exit_code == EXIT_STOPPED:
            break
    states = [read_status(folder.with_name(run.recipe.name)) for run in runs]
    num_finished = sum(status is not None and status.state == "finished" for status in states)
    exit_code = EXIT_STOPPED if EXIT_STOPPED in codes else next(iter(codes), EXIT_OK)
    return SweepEnd(folder, len(runs), num_finished, failures, exit_code)


def _open_sweep(folder: Path, name: str, recipe: Recipe, runs: Sequence[SweepRun], prepare: Prepare) -> None:
    """Create the folder of a new sweep once every run has its data; refuse the folder of another sweep."""
    if (folder / SWEEP_FILE).is_file():
        file = folder / RECIPE_FILE
        if not file.is_file():
            raise UserError(
                f"{relative(folder)} is a sweep that was submitted to Slurm.",
                "its runs belong to the jobs of that sweep.",
                f"use `packhorse resume {relative(folder)}`, or choose another name, for example name={folder.name}-b.",
            )
        if load_recipe(str(file)) != recipe:
            raise UserError(
                f"{relative(folder)} is a sweep of another recipe or of other overrides.",
                "the runs of one sweep differ in the fields of the sweep alone.",
                f"finish that sweep with `packhorse resume {relative(folder)}`, or choose another name, for example "
                f"name={folder.name}-b.",
            )
        return
    for path in (folder, *(folder.with_name(run.recipe.name) for run in runs)):
        check_free(path)
    for run in runs:
        check_start(run.recipe)
        if find_prepared(run.recipe) is None:
            prepare(run.recipe)
    create_sweep(folder, name, runs, {RECIPE_FILE: dump_recipe(recipe)})
