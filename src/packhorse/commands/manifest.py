"""`packhorse manifest`: the same plan as a task of SkyPilot, or as a job of Kubeflow."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from packhorse.commands.inquiry import inquire, read_gpus
from packhorse.errors import EXIT_OK, UserError
from packhorse.estimate.plan_estimate import estimate_plan
from packhorse.estimate.search.auto import plan_best
from packhorse.launching.places.task_files import KINDS, read_container_settings, task_file
from packhorse.plan.run_plan import RunPlan
from packhorse.recipe.load import load_recipe
from packhorse.run_folder.folder import open_run
from packhorse.run_folder.layout import PLAN_FILE


def manifest(
    recipe: str, overrides: Sequence[str], to: str, image: str, volume: str, gpus: str, nodes: int | None
) -> int:
    """Prints it; starts and writes nothing."""
    if to not in KINDS:
        raise UserError(
            f"--to is {to!r}.",
            "each place has a form of its own.",
            f"write --to {', --to '.join(KINDS)}.",
        )
    plan = _plan_of(recipe, overrides, gpus, nodes)
    sys.stdout.write(task_file(to, plan, read_container_settings(plan, image, volume)))
    return EXIT_OK


def _plan_of(recipe: str, overrides: Sequence[str], gpus: str, nodes: int | None) -> RunPlan:
    """Of a run as it is; of a recipe as `packhorse plan` makes it.

    Raises:
        UserError: Something is changed of a run, or there is no such recipe.
    """
    if (Path(recipe) / PLAN_FILE).is_file():
        if overrides or gpus or nodes:
            raise UserError(
                f"{recipe} is a run, and its plan is made: it takes no overrides, --gpus or --nodes.",
                "the manifest starts what the run folder says.",
                "leave them out, or name the recipe.",
            )
        return open_run(recipe)
    loaded = load_recipe(recipe, overrides, check_environment=False)
    found = inquire(loaded, *read_gpus(gpus, nodes))
    plan = plan_best(found.wanted, found.known)
    case = estimate_plan(plan, found.known) if found.known is not None else None
    return case.predicted_plan() if case is not None else plan
