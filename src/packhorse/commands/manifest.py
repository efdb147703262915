"""`packhorse manifest`: the same plan as a task of SkyPilot, or as a job of Kubeflow."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from packhorse.commands.costs import basis_of
from packhorse.commands.parameters import Unknown
from packhorse.commands.plan import data_facts, manifest_if_prepared, read_gpus
from packhorse.data.places import data_root
from packhorse.errors import EXIT_OK, UserError
from packhorse.launching.places.manifests import KINDS, manifest_text
from packhorse.launching.places.request import read_request
from packhorse.launching.run_folder import open_run
from packhorse.plan.auto import plan_best
from packhorse.plan.compare import Wanted
from packhorse.plan.cost.case import case_of
from packhorse.plan.hardware import detect_hardware
from packhorse.plan.run_plan import PLAN_FILE, RunPlan
from packhorse.recipe.load import load_recipe


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
    sys.stdout.write(manifest_text(to, plan, read_request(plan, image, volume)))
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
    found = manifest_if_prepared(loaded)
    facts = data_facts(data_root(loaded) / found.content_hash, found) if found else None
    here = detect_hardware()
    ask, terms = read_gpus(gpus, nodes)
    basis = basis_of(loaded, found, here, terms)
    wanted = Wanted(loaded, ask, here, facts)
    if isinstance(basis, Unknown):
        return plan_best(wanted, None)
    plan = plan_best(wanted, basis)
    case = case_of(plan, basis)
    return case.noted() if case is not None else plan
