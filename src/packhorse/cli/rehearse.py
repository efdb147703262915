"""`packhorse plan --dry-run`: run one step of a small model of the recipe, as rank 0 of all planned ranks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.console import Console

from packhorse.cli.show.text import open_console, pairs, plain_table, print_json
from packhorse.errors import EXIT_BUG, EXIT_OK, UserError
from packhorse.model_spec.configuration import find_configuration
from packhorse.plan.run_plan import RunPlan
from packhorse.recipe.schema import Recipe
from packhorse.workflows.plan_request import plan_request, plan_with_estimates, read_gpus

if TYPE_CHECKING:
    from packhorse.estimate.measure.rehearse import Rehearsal

TOLERANCE = 0.02


def rehearse(recipe: Recipe, gpus: str, nodes: int | None, as_json: bool) -> int:
    """Plan, run one step without the other ranks, and compare its memory with what the plan counts.

    Raises:
        UserError: The recipe, its engine or its architecture cannot run without the other ranks.
    """
    if gpus.startswith("auto"):
        raise UserError(
            f"--gpus is {gpus}, with --dry-run.",
            "a dry run is for one plan, and auto searches many.",
            "name the GPUs, for example --gpus 8xH100-80GB.",
        )
    request = plan_request(recipe, *read_gpus(gpus, nodes))
    plan = plan_with_estimates(request, find_changes=False).plan
    # Before torch is imported: a dry run takes no GPU, even if there is one.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ |= {"ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"}
    from packhorse.estimate.measure.rehearse import rehearse as run_step

    rehearsal = run_step(plan, find_configuration(plan.recipe, request.vocab_size))
    if as_json:
        print_json(asdict(rehearsal))
    else:
        _show(open_console(), plan, rehearsal)
    return EXIT_BUG if too_much(rehearsal) else EXIT_OK


def too_much(rehearsal: Rehearsal) -> list[str]:
    """Return the components of which the rank holds more than the plan counts for the fullest rank."""
    planned = rehearsal.planned or rehearsal.held
    return [name for name, size in rehearsal.held.items() if size > (1 + TOLERANCE) * planned[name]]


def _show(console: Console, plan: RunPlan, rehearsal: Rehearsal) -> None:
    calls = [f"{count} {name}" for name, count in sorted(rehearsal.collectives.items())]
    ranks, engine = f"rank {rehearsal.rank} of {rehearsal.world_size}", plan.topology.engine
    lines = [
        ("dry run", f"one step as {ranks}, {engine}; nothing was sent"),
        ("model", f"{rehearsal.num_parameters:,} parameters: the recipe's architecture with few, narrow layers"),
        *rehearsal.runs.items(),
        *((f"{name} group", _members(ranks)) for name, ranks in rehearsal.groups.items()),
        (
            "micro-batches",
            f"{len(rehearsal.passes)} of {rehearsal.passes[0]} packs; {plan.batch.packs_per_step} packs per step",
        ),
        ("collectives", ", ".join(calls) or "none"),
    ]
    console.print(pairs(lines))
    console.print()
    table = plain_table("held by the rank", "bytes", "counted by the plan", right=("bytes", "counted by the plan"))
    wrong = too_much(rehearsal)
    for name, size in rehearsal.held.items():
        counted = "not counted" if rehearsal.planned is None else f"{rehearsal.planned[name]:,}"
        table.add_row(name, f"{size:,}", counted + "  more than it counts" * (name in wrong))
    console.print(table)


def _members(ranks: Sequence[int]) -> str:
    """Return the ranks; of many, the first, the last and the distance."""
    if len(ranks) <= 4:
        return ", ".join(map(str, ranks))
    step = ranks[1] - ranks[0]
    return f"{len(ranks)} ranks, {ranks[0]} to {ranks[-1]}" + (f", every {step}" if step > 1 else "")
