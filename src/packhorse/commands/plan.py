"""`packhorse plan`: looking, from any laptop; nothing here imports torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from packhorse.commands.calibrate import measured_of
from packhorse.commands.costs import Terms, room_on_disk, with_guess
from packhorse.commands.inquiry import inquire, read_gpus
from packhorse.commands.lines import pairs, shown
from packhorse.commands.parameters import Unknown, parameter_lines, show_parameters
from packhorse.commands.plan_values import least_value, plan_value, scaling_value, ways_value
from packhorse.commands.plan_view import (
    change_table,
    component_table,
    least_table,
    phase_table,
    scaling_table,
    stop_words,
    storage_lines,
    time_lines,
    verdict_words,
    ways_table,
)
from packhorse.durable import size
from packhorse.errors import EXIT_OK, UserError
from packhorse.estimate.gpus import find_gpu, known_gpus
from packhorse.estimate.plan_estimate import EstimateInputs, PlanEstimate, estimate_plan
from packhorse.estimate.search.auto import least_hardware, plan_best
from packhorse.estimate.search.candidates import SearchRequest, all_candidates, automatic_choice
from packhorse.estimate.search.changes import Change, changes_that_fit
from packhorse.estimate.search.scaling import MemoryByScale, scale
from packhorse.launching.places.node_commands import launch_commands
from packhorse.plan.command import job_argv, launch_files
from packhorse.plan.run_plan import RunPlan, differences
from packhorse.plan.topology import DeviceRequest
from packhorse.recipe.describe import summary
from packhorse.recipe.load import load_recipe
from packhorse.recipe.schema import Recipe
from packhorse.run_folder.folder import open_run, relative

DEEPSPEED = "; what DeepSpeed is told stands in plan.json"


@dataclass(frozen=True)
class Asked:
    """What is to be shown beside the plan, and of which GPUs.

    Attributes:
        gpus: `8`, `8xH100-80GB`, `auto` or `autoxH100-80GB`; empty: as the recipe or this machine says.
        nodes: Machines that share them.
        network_gbit: Gbit/s of one GPU between nodes.
        price: Of a GPU hour.
        compare: Every way to run the recipe, in place of one.
        scale: Numbers of GPUs, in place of one.
        as_json: One JSON value in place of text.
        argv: The launch line alone, of several nodes each.
        diff: A run that the plan is compared with.
        calibrate: A run whose measured steps correct the time.
    """

    gpus: str = ""
    nodes: int | None = None
    network_gbit: float | None = None
    price: float | None = None
    compare: bool = False
    scale: bool = False
    as_json: bool = False
    argv: bool = False
    diff: str = ""
    calibrate: str = ""


def plan(recipe: str, overrides: Sequence[str], asked: dict[str, Any]) -> int:
    """Shows what would run, whether it fits, how long it takes; prepares nothing, writes nothing."""
    wish = Asked(**asked)
    loaded = load_recipe(recipe, overrides, check_environment=False)
    console = Console()
    if wish.gpus.startswith("auto"):
        return _least(console, loaded, wish)
    found = inquire(loaded, *read_gpus(wish.gpus, wish.nodes, wish.network_gbit, wish.price))
    wanted, basis = found.wanted, found.basis
    if not isinstance(basis, Unknown):
        basis = with_guess(basis, loaded)
        basis = replace(basis, measured=measured_of(open_run(wish.calibrate)) if wish.calibrate else None)
    if wish.compare:
        return _compare(console, wanted, basis, wish.as_json)
    if wish.scale:
        return _scale(console, wanted, basis, wish.as_json)
    made = plan_best(wanted, None if isinstance(basis, Unknown) else basis)
    case = None if isinstance(basis, Unknown) else estimate_plan(made, basis)
    if wish.argv:
        one = made.topology.num_nodes == 1
        text = shown(made.argv) if one else launch_commands(made)
        console.print(text, soft_wrap=True, highlight=False, markup=False)
    elif wish.diff:
        _diff(console, open_run(wish.diff), made, wish.as_json)
    else:
        changes = changes_that_fit(wanted, case) if case is not None and not case.fits else []
        unknown = basis.reason if isinstance(basis, Unknown) else ""
        if wish.as_json:
            _print_json(plan_value(made, case, unknown, changes, _now()))
        else:
            _show(console, made, found.vocab_size)
            _show_costs(console, case, unknown, changes, wish.gpus)
    return EXIT_OK


def _least(console: Console, recipe: Recipe, wish: Asked) -> int:
    """`--gpus auto`: the fewest GPUs of one kind, or of each."""
    name = wish.gpus.removeprefix("auto").lstrip("x×*").strip()
    kinds = [find_gpu(name)] if name else list(known_gpus().values())
    if wish.nodes is not None:
        raise UserError(
            f"--nodes is {wish.nodes}, and --gpus is {wish.gpus}.",
            "as many nodes are taken as the GPUs need, at 8 a node.",
            "leave --nodes out.",
        )
    found = inquire(recipe, DeviceRequest(), Terms(kinds[0], wish.network_gbit, wish.price))
    basis = found.basis
    if isinstance(basis, Unknown):
        raise _not_known(basis, recipe)
    least = least_hardware(found.wanted, with_guess(basis, recipe), kinds)
    if wish.as_json:
        _print_json(least_value(least))
    else:
        console.print(least_table(least))
        console.print(f"from {_assumed(basis)}", style="dim", highlight=False)
    return EXIT_OK


def _compare(console: Console, wanted: SearchRequest, basis: EstimateInputs | Unknown, as_json: bool) -> int:
    if isinstance(basis, Unknown):
        raise _not_known(basis, wanted.recipe)
    found = all_candidates(wanted, basis)
    winner = automatic_choice(found)
    if winner is None:
        errors = {way.engine: way.error for way in found if way.error is not None}
        raise errors.get("ddp") or next(iter(errors.values()))
    if as_json:
        _print_json(ways_value(found, winner))
    else:
        console.print(ways_table(found, winner))
        console.print(f"from {_assumed(basis)}", style="dim", highlight=False)
    return EXIT_OK


def _scale(console: Console, wanted: SearchRequest, basis: EstimateInputs | Unknown, as_json: bool) -> int:
    """Weak scaling keeps the work of a GPU, strong scaling shares the recipe's own packs."""
    if isinstance(basis, Unknown):
        raise _not_known(basis, wanted.recipe)
    recipe = wanted.recipe
    if "auto" in (recipe.parallel.engine, recipe.parallel.checkpointing):
        recipe = plan_best(wanted, basis).recipe
    counted: MemoryByScale = {}
    weak, strong = (
        scale(recipe, basis.shape, basis.packs, basis.gpu, mode, network_gb=basis.network_gb, counted=counted)
        for mode in ("weak", "strong")
    )
    if as_json:
        _print_json([scaling_value(weak), scaling_value(strong)])
        return EXIT_OK
    for each in (weak, strong):
        console.print(scaling_table(each, basis.gpu.memory_bytes))
        console.print(pairs([(f"{each.mode} scaling", stop_words(each))]))
        console.print()
    console.print(f"{basis.gpu.name}, {recipe.parallel.engine}; from {_assumed(basis)}", style="dim", highlight=False)
    return EXIT_OK


def _not_known(unknown: Unknown, recipe: Recipe) -> UserError:
    return UserError(
        f"memory and time of {recipe.name} are not known: {unknown.reason}.",
        "ways and GPUs are compared by them.",
        "name the GPU as --gpus 8xH100-80GB does, and a model whose config.json is on this machine.",
    )


def _assumed(basis: EstimateInputs) -> str:
    if basis.packs.is_measured:
        return f"the {basis.packs.num_packs:,} packs of the prepared data"
    guessed = f"; the number of steps is {basis.guessed.reason}" if basis.guessed is not None else ""
    return "the worst case, because the data is not prepared: each pack is one document, all supervised" + guessed


def _diff(console: Console, before: RunPlan, after: RunPlan, as_json: bool) -> None:
    found = differences(before, after)
    if as_json:
        _print_json([{"field": each.field, "run": each.before, "plan": each.after} for each in found])
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("field", relative(before.run_folder), "this plan"):
        table.add_column(heading, overflow="fold")
    for each in found:
        table.add_row(each.field, Text(str(each.before)), Text(str(each.after)))
    console.print(table if found else "the plans are the same")


def _print_json(value: Any) -> None:  # noqa: ANN401
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _show(console: Console, made: RunPlan, vocab_size: int | None) -> None:
    topology, batch = made.topology, made.batch
    tokens = batch.packs_per_step * batch.length_tokens
    lines = [*summary(made.recipe), *parameter_lines(made.recipe, vocab_size)]
    lines += [
        ("topology", f"{topology.num_nodes} x {topology.processes_per_node} {topology.device}, {topology.engine}"),
        (
            "a step",
            f"{topology.world_size} processes x {batch.accumulation_steps} passes x {batch.micro_packs} packs"
            f" = {batch.packs_per_step} packs, {tokens:,} tokens",
        ),
    ]
    if made.data is not None:
        facts = made.data
        lines.append(("prepared", f"{facts.num_rows:,} rows in {facts.num_packs:,} packs, {facts.fill:.2%} full"))
    lines += [(decision.name, f"{decision.value}: {decision.reason}") for decision in made.decisions]
    lines += [("checkpoints", _room(made, vocab_size))]
    env = " ".join(f"{name}={value}" for name, value in made.env.items())
    lines += [("run folder", made.run_folder), ("command", shown(made.argv)), ("environment", env)]
    lines += [
        ("files", ", ".join(relative(file) for file in launch_files(made)) + DEEPSPEED * (made.deepspeed is not None))
    ]
    job = job_argv(made)
    if job:
        lines.append(("job", f"{shown(job)}, after --write"))
    console.print(pairs(lines))
    show_parameters(console, made.recipe, vocab_size)


def _show_costs(
    console: Console, case: PlanEstimate | None, unknown: str, changes: Sequence[Change], gpus: str
) -> None:
    console.print()
    if case is None:
        console.print(pairs([("memory, time", f"not known: {unknown}")]))
        return
    console.print(pairs([("memory", verdict_words(case))]))
    console.print(phase_table(case))
    console.print()
    console.print(component_table(case))
    if changes:
        console.print()
        console.print(change_table(changes))
    elif not case.fits:
        console.print(f"nothing tried makes it fit; see packhorse plan RECIPE --gpus auto (asked: {gpus or 'here'})")
    console.print()
    lines = [*storage_lines(case), *time_lines(case, _now()), ("from", _assumed(case.basis))]
    console.print(pairs(lines))


def _now() -> datetime:
    return datetime.now().astimezone()


def _room(made: RunPlan, vocab_size: int | None) -> str:
    room = room_on_disk(made, vocab_size)
    if room is None:
        return "their size is known when the model is loaded; whether the disk holds them is not checked before"
    return f"{size(room.each_bytes)} each, {room.count} at once at most: {size(room.total_bytes)}"
