"""`packhorse submit`: refuse early, show or send the jobs of a run, say what will run and when it may start."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from packhorse.commands.planned_jobs import Asked, is_run, planned_jobs, submission
from packhorse.commands.sending import show_or_send
from packhorse.commands.submit_sweep import submit_sweep
from packhorse.errors import UserError
from packhorse.recipe.load import load_recipe
from packhorse.recipe.sweep import is_sweep


def submit(recipe: str, overrides: Sequence[str], asked: dict[str, Any]) -> int:
    """Submits a recipe as a new run, or as one for each run of its sweep; or a run that is there to go on with it.

    Raises:
        UserError: Anything that the user can mend, before a job is sent; or Slurm refuses one.
    """
    wish = Asked(**asked)
    if not is_run(recipe) and is_sweep(load_recipe(recipe, overrides)):
        return submit_sweep(recipe, overrides, wish)
    if wish.at_once is not None:
        raise UserError(
            f"--at-once is {wish.at_once}, and {recipe} is one run.",
            "it says how many runs of a sweep may run at the same time.",
            "leave it out, or vary a field: --array seed=1,2,3.",
        )
    found = submission(recipe, overrides, wish)
    return show_or_send(found, planned_jobs(found), wish.dry_run)
