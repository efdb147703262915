"""`packhorse plan --dry-run`: one step of a small model of the recipe, as rank 0 of all the ranks that are planned."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from packhorse.commands.inquiry import inquire, read_gpus
from packhorse.commands.lines import pairs
from packhorse.errors import EXIT_BUG, EXIT_OK, UserError
from packhorse.estimate.search.auto import plan_best
from packhorse.model_spec.configuration import find_configuration
from packhorse.plan.run_plan import RunPlan
from packhorse.recipe.load import load_recipe

if TYPE_CHECKING:
    from packhorse.estimate.measure.rehearse import Rehearsal

TOLERANCE = 0.02


def rehearse(recipe: str, overrides: Sequence[str], gpus: str, nodes: int | None, as_json: bool) -> int:
    """Plans, steps once without the other ranks, and compares what is held with what the plan counts.

    Raises:
        UserError: The recipe, its engine or its architecture cannot be rehearsed.
    """
    loaded = load_recipe(recipe, overrides, check_environment=False)
    if gpus.startswith("auto"):
        raise UserError(
            f"--gpus is {gpus}, with --dry-run.",
            "a rehearsal is that of one plan, and auto looks through many.",
            "name the GPUs, for example --gpus 8xH100-80GB.",
        )
    found = inquire(loaded, *read_gpus(gpus, nodes))
    made = plan_best(found.wanted, found.known)
    # Before torch is imported: a rehearsal takes no GPU, also where there is one.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ |= {"ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"}
    from packhorse.estimate.measure.rehearse import rehearse as step

    done = step(made, find_configuration(made.recipe, found.vocab_size))
    if as_json:
        sys.stdout.write(json.dumps(asdict(done), indent=2) + "\n")
    else:
        _show(Console(), made, done)
    return EXIT_BUG if too_much(done) else EXIT_OK


def too_much(done: Rehearsal) -> list[str]:
    """Components of which the rank holds more than the plan counts for the fullest rank."""
    planned = done.planned or done.held
    return [name for name, size in done.held.items() if size > (1 + TOLERANCE) * planned[name]]


def _show(console: Console, plan: RunPlan, done: Rehearsal) -> None:
    calls = [f"{count} {name}" for name, count in sorted(done.collectives.items())]
    lines = [
        ("rehearsed", f"one step as rank {done.rank} of {done.world_size}, {plan.topology.engine}; nothing was sent"),
        ("model", f"{done.num_parameters:,} parameters: the recipe's architecture with few, narrow layers"),
        *done.runs.items(),
        *((f"{name} group", _members(ranks)) for name, ranks in done.groups.items()),
        ("passes", f"{len(done.passes)} of {done.passes[0]} packs of {plan.batch.packs_per_step} a step"),
        ("collectives", ", ".join(calls) or "none"),
    ]
    console.print(pairs(lines))
    console.print()
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("held by the rank")
    for heading in ("bytes", "counted by the plan"):
        table.add_column(heading, justify="right")
    wrong = too_much(done)
    for name, size in done.held.items():
        counted = "not counted ahead" if done.planned is None else f"{done.planned[name]:,}"
        table.add_row(name, f"{size:,}", counted + "  more than it counts" * (name in wrong))
    console.print(table)


def _members(ranks: Sequence[int]) -> str:
    """Numbers, or the first, the step and the last of many."""
    if len(ranks) <= 4:
        return ", ".join(map(str, ranks))
    step = ranks[1] - ranks[0]
    return f"{len(ranks)} ranks, {ranks[0]} to {ranks[-1]}" + (f", every {step}" if step > 1 else "")
