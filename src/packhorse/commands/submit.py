"""`packhorse submit`: refuse early, show or send the jobs of a run, say what will run and when it may start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from packhorse.commands.planned_jobs import is_run, planned_jobs, submission
from packhorse.commands.sending import show_or_send
from packhorse.commands.submit_sweep import submit_sweep
from packhorse.recipe.load import load_recipe
from packhorse.recipe.sweep import is_sweep


@dataclass(frozen=True)
class Asked:
    """What the command line asks for.

    Attributes:
        nodes: Nodes; None takes those of the run, or one.
        gpus_per_node: GPUs of each; None takes those of the run, or the site's.
        site: A site profile; empty takes the run's own, or `site.yaml` of this folder.
        time: Time limit of the job; empty takes the site's.
        dry_run: Only show.
        force: Even if the GPUs cannot hold it.
    """

    nodes: int | None = None
    gpus_per_node: int | None = None
    site: str = ""
    time: str = ""
    dry_run: bool = False
    force: bool = False


def submit(recipe: str, overrides: Sequence[str], asked: dict[str, Any]) -> int:
    """Submits a recipe as a new run, or as one for each run of its sweep; or a run that is there to go on with it.

    Raises:
        UserError: Anything that the user can mend, before a job is sent; or Slurm refuses one.
    """
    wish = Asked(**asked)
    if not is_run(recipe) and is_sweep(load_recipe(recipe, overrides)):
        size = (wish.nodes, wish.gpus_per_node)
        return submit_sweep(recipe, overrides, wish.site, *size, wish.time, wish.force, wish.dry_run)
    found = submission(recipe, overrides, wish.site, wish.nodes, wish.gpus_per_node, wish.time, wish.force)
    return show_or_send(found, planned_jobs(found), wish.dry_run)
