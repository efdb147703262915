"""`packhorse manifest`: a plan as a task of SkyPilot, or as a job of Kubeflow."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from packhorse.errors import EXIT_OK, UserError
from packhorse.launching.places.task_files import KINDS, read_container_settings, task_file
from packhorse.plan.run_plan import RunPlan
from packhorse.recipe.load import load_recipe
from packhorse.run_folder.folder import open_run
from packhorse.run_folder.layout import PLAN_FILE
from packhorse.workflows.plan_request import plan_request, plan_with_estimates, read_gpus


def manifest(
    recipe: str, overrides: Sequence[str], to: str, image: str, volume: str, gpus: str, nodes: int | None
) -> int:
    """Print the manifest. Starts and writes nothing."""
    if to not in KINDS:
        raise UserError(
            f"--to is {to!r}.",
            f"--to must be one of {', '.join(KINDS)}.",
            f"write --to {', --to '.join(KINDS)}.",
        )
    plan = _plan_of(recipe, overrides, gpus, nodes)
    sys.stdout.write(task_file(to, plan, read_container_settings(plan, image, volume)))
    return EXIT_OK


def _plan_of(recipe: str, overrides: Sequence[str], gpus: str, nodes: int | None) -> RunPlan:
    """Return the plan of a run unchanged, or of a recipe as `packhorse plan` makes it.

    Raises:
        UserError: A run is given with changes, or there is no such recipe.
    """
    if (Path(recipe) / PLAN_FILE).is_file():
        if overrides or gpus or nodes:
            raise UserError(
                f"{recipe} is a run with a plan: it takes no overrides, --gpus or --nodes.",
                "the manifest starts the plan in the run folder.",
                "remove them, or name the recipe.",
            )
        return open_run(recipe)
    loaded = load_recipe(recipe, overrides, check_environment=False)
    result = plan_with_estimates(plan_request(loaded, *read_gpus(gpus, nodes)), find_changes=False)
    return result.case.predicted_plan() if result.case is not None else result.plan
