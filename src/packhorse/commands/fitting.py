"""Plans that are to be run: refused where the GPUs cannot hold them."""

from __future__ import annotations

from dataclasses import replace

from packhorse.commands.parameters import Unknown
from packhorse.estimate.packs import PackFigures
from packhorse.estimate.plan_estimate import EstimateInputs, PlanEstimate
from packhorse.estimate.search.auto import plan_best
from packhorse.estimate.search.candidates import SearchRequest
from packhorse.estimate.search.changes import refuse_unfit
from packhorse.plan.run_plan import RunPlan


def draft_plan(wanted: SearchRequest, basis: EstimateInputs | Unknown, force: bool) -> RunPlan:
    """The plan before the data is prepared; refused if weights and states alone are too much for the GPUs.

    Raises:
        UserError: As `plan.auto.plan_best`; or they are.
    """
    if isinstance(basis, Unknown):
        return plan_best(wanted, None)
    least = replace(basis, packs=PackFigures.full(1))
    made = plan_best(wanted, least)
    # The message has the figures of whole packs, which need more.
    return made if force or PlanEstimate(made, least).fits else fitting_plan(wanted, basis, force)


def fitting_plan(wanted: SearchRequest, basis: EstimateInputs | Unknown, force: bool) -> RunPlan:
    """The plan; refused if the GPUs cannot hold it, where that is known.

    Raises:
        UserError: As `plan.auto.plan_best`; or they cannot.
    """
    if isinstance(basis, Unknown):
        return plan_best(wanted, None)
    made = plan_best(wanted, basis)
    if not force:
        refuse_unfit(wanted, PlanEstimate(made, basis))
    return made
