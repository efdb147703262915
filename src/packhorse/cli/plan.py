"""`packhorse plan`: what would run, from any laptop. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.text import Text

from packhorse.cli.show.parameters import parameter_lines, show_parameters
from packhorse.cli.show.plan import (
    change_table,
    component_table,
    least_table,
    phase_table,
    scaling_table,
    stop_words,
    storage_lines,
    time_lines,
    verdict_lines,
    ways_table,
)
from packhorse.cli.show.plan_json import least_value, plan_value, scaling_value, ways_value
from packhorse.cli.show.text import open_console, pairs, plain_table, print_json, print_plain, shown
from packhorse.durable import size
from packhorse.errors import EXIT_OK, UserError
from packhorse.estimate.gpus import find_gpu, known_gpus
from packhorse.estimate.plan_estimate import EstimateInputs, PlanEstimate
from packhorse.estimate.search.auto import least_hardware, plan_best, refusal
from packhorse.estimate.search.candidates import all_candidates, automatic_choice, best_by_setting
from packhorse.estimate.search.scaling import MemoryByScale, scale
from packhorse.launching.places.node_commands import launch_commands
from packhorse.plan.command import job_argv, launch_files
from packhorse.plan.run_plan import RunPlan, differences
from packhorse.plan.topology import DeviceRequest
from packhorse.recipe.describe import summary
from packhorse.recipe.load import load_recipe
from packhorse.recipe.schema import Recipe
from packhorse.run_folder.folder import open_run, relative
from packhorse.workflows.evaluation_power import power_of
from packhorse.workflows.model_shape import Unknown
from packhorse.workflows.plan_basis import GpuTerms, room_on_disk
from packhorse.workflows.plan_request import (
    PlanRequest,
    PlanResult,
    completed,
    plan_request,
    plan_with_estimates,
    read_gpus,
)

DEEPSPEED = "; the DeepSpeed configuration is in plan.json"


def plan(
    recipe: str,
    overrides: Sequence[str],
    gpus: str,
    nodes: int | None,
    price: float | None,
    network: float | None,
    compare: bool,
    scale: bool,
    json: bool,
    argv: bool,
    diff: str,
    calibrate: str,
    dry_run: bool,
    write: bool,
    force: bool,
) -> int:
    """Show what would run, whether it fits and how long it takes; with --write, create the run folder."""
    console = open_console()
    if write:
        return _write(console, recipe, overrides, gpus, nodes, force)
    loaded = load_recipe(recipe, overrides, check_environment=False)
    if dry_run:
        # Only here: a dry run imports torch.
        from packhorse.cli.rehearse import rehearse

        return rehearse(loaded, gpus, nodes, json)
    if gpus.startswith("auto"):
        return _least(console, loaded, gpus, nodes, network, price, json)
    request = completed(plan_request(loaded, *read_gpus(gpus, nodes, network, price)), calibrate)
    if compare:
        return _compare(console, request, json)
    if scale:
        return _scale(console, request, json)
    result = plan_with_estimates(request, find_changes=not argv and not diff)
    if argv:
        one = result.plan.topology.num_nodes == 1
        print_plain(shown(result.plan.argv) if one else launch_commands(result.plan), console)
    elif diff:
        _diff(console, open_run(diff), result.plan, json)
    elif json:
        print_json(plan_value(result, _now()) | _evaluation_value(request))
    else:
        _show_verdict(console, result, gpus)
        _show(console, result.plan, request)
        if result.case is not None:
            _show_estimates(console, result.case)
    return EXIT_OK


def _write(console: Console, recipe: str, overrides: Sequence[str], gpus: str, nodes: int | None, force: bool) -> int:
    # Only here: looking at a plan needs none of what creates a run.
    from packhorse.cli.prepare import prepare_with_progress
    from packhorse.workflows.new_run import write_run

    plan = write_run(recipe, overrides, gpus, nodes, force, prepare_with_progress)
    print_plain(f"planned {relative(plan.run_folder)}: {shown(job_argv(plan) or plan.argv)}", console)
    return EXIT_OK


def _least(
    console: Console,
    recipe: Recipe,
    gpus: str,
    nodes: int | None,
    network: float | None,
    price: float | None,
    as_json: bool,
) -> int:
    """Show the fewest GPUs of one kind, or of each, for `--gpus auto`."""
    name = gpus.removeprefix("auto").lstrip("x×*").strip()
    kinds = [find_gpu(name)] if name else list(known_gpus().values())
    if nodes is not None:
        raise UserError(
            f"--nodes is {nodes}, and --gpus is {gpus}.",
            "auto takes as many nodes as the GPUs need, with 8 GPUs per node.",
            "leave --nodes out.",
        )
    request = completed(plan_request(recipe, DeviceRequest(), GpuTerms(kinds[0], network, price)))
    basis = _known_basis(request)
    least = least_hardware(request.wanted, basis, kinds)
    if as_json:
        print_json(least_value(least))
    else:
        console.print(least_table(least))
        console.print(f"from {_assumed(basis)}", style="dim", highlight=False)
    return EXIT_OK


def _compare(console: Console, request: PlanRequest, as_json: bool) -> int:
    basis = _known_basis(request)
    candidates = best_by_setting(all_candidates(request.wanted, basis))
    winner = automatic_choice(candidates)
    if winner is None:
        raise refusal(candidates)
    if as_json:
        print_json(ways_value(candidates, winner))
    else:
        console.print(ways_table(candidates, winner))
        console.print(f"from {_assumed(basis)}", style="dim", highlight=False)
    return EXIT_OK


def _scale(console: Console, request: PlanRequest, as_json: bool) -> int:
    """Show weak scaling, which keeps the work per GPU, and strong scaling, which divides the recipe's packs."""
    basis, recipe = _known_basis(request), request.wanted.recipe
    if "auto" in (recipe.parallel.engine, recipe.parallel.checkpointing):
        recipe = plan_best(request.wanted, basis).recipe
    counted: MemoryByScale = {}
    modes = [scale(recipe, basis, mode, counted=counted) for mode in ("weak", "strong")]
    if as_json:
        print_json([scaling_value(scaling) for scaling in modes])
        return EXIT_OK
    for scaling in modes:
        console.print(scaling_table(scaling, basis.gpu.memory_bytes))
        console.print(pairs([(f"{scaling.mode} scaling", stop_words(scaling))]))
        console.print()
    console.print(f"{basis.gpu.name}, {recipe.parallel.engine}; from {_assumed(basis)}", style="dim", highlight=False)
    return EXIT_OK


def _known_basis(request: PlanRequest) -> EstimateInputs:
    if not isinstance(request.basis, Unknown):
        return request.basis
    raise UserError(
        f"memory and time of {request.wanted.recipe.name} are not known: {request.basis.reason}.",
        "configurations and GPUs are compared by memory and time.",
        "name the GPU, for example --gpus 8xH100-80GB, and a model whose config.json is on this machine.",
    )


def _assumed(basis: EstimateInputs) -> str:
    if basis.packs.is_measured:
        return f"the {basis.packs.num_packs:,} packs of the prepared data"
    guessed = f"; the number of steps is {basis.guessed.reason}" if basis.guessed is not None else ""
    return "the worst case, because the data is not prepared: each pack is one document, all supervised" + guessed


def _diff(console: Console, before: RunPlan, after: RunPlan, as_json: bool) -> None:
    changes = differences(before, after)
    if as_json:
        print_json([{"field": change.field, "run": change.before, "plan": change.after} for change in changes])
        return
    table = plain_table("field", relative(before.run_folder), "this plan")
    for change in changes:
        table.add_row(change.field, Text(str(change.before)), Text(str(change.after)))
    console.print(table if changes else "the plans are the same")


def _show(console: Console, plan: RunPlan, request: PlanRequest) -> None:
    topology, batch, vocab_size = plan.topology, plan.batch, request.vocab_size
    tokens, num_null = batch.packs_per_step * batch.length_tokens, batch.num_null_packs(topology.data_ranks)
    lines = [*summary(plan.recipe), *parameter_lines(plan.recipe, vocab_size)]
    lines += [
        ("topology", f"{topology.num_nodes} x {topology.processes_per_node} {topology.device}, {topology.engine}"),
        (
            "step",
            f"{topology.world_size} processes x {batch.accumulation_steps} micro-batches x {batch.micro_packs} packs"
            f" = {batch.packs_per_step + num_null} packs{f', {num_null} of them empty' if num_null else ''},"
            f" {tokens:,} tokens",
        ),
    ]
    if plan.data is not None:
        facts = plan.data
        lines.append(("prepared", f"{facts.num_rows:,} rows in {facts.num_packs:,} packs, {facts.fill:.2%} full"))
    lines += [(decision.name, f"{decision.value}: {decision.reason}") for decision in plan.decisions]
    if request.manifest is not None:
        lines.append(("evaluation", power_of(plan.recipe, request.manifest.splits).words))
    env = " ".join(f"{name}={value}" for name, value in plan.env.items())
    files = ", ".join(relative(file) for file in launch_files(plan)) + DEEPSPEED * (plan.deepspeed is not None)
    lines += [
        ("checkpoints", _checkpoint_words(plan, vocab_size)),
        ("run folder", plan.run_folder),
        ("command", shown(plan.argv)),
        ("environment", env),
        ("files", files),
    ]
    job = job_argv(plan)
    if job:
        lines.append(("job", f"{shown(job)}, after --write"))
    console.print(pairs(lines))
    show_parameters(console, plan.recipe, vocab_size)


def _evaluation_value(request: PlanRequest) -> dict[str, Any]:
    """Return what an evaluation can show; nothing before the data is prepared."""
    if request.manifest is None:
        return {}
    return {"evaluation": asdict(power_of(request.wanted.recipe, request.manifest.splits))}


def _show_verdict(console: Console, result: PlanResult, gpus: str) -> None:
    """Show what decides whether to run: memory, time, cost; and the changes that make it fit."""
    case = result.case
    if case is None:
        console.print(pairs([("memory, time", f"not known: {result.unknown}")]))
    else:
        console.print(pairs(verdict_lines(case, _now())))
        if result.changes:
            console.print()
            console.print(change_table(result.changes))
        elif not case.fits:
            requested = gpus or "those of this machine"
            console.print(f"no change makes it fit {requested}; see packhorse plan RECIPE --gpus auto")
    console.print()


def _show_estimates(console: Console, case: PlanEstimate) -> None:
    console.print()
    console.print(phase_table(case))
    console.print()
    console.print(component_table(case))
    console.print()
    console.print(pairs([*storage_lines(case), *time_lines(case), ("from", _assumed(case.basis))]))


def _now() -> datetime:
    return datetime.now().astimezone()


def _checkpoint_words(plan: RunPlan, vocab_size: int | None) -> str:
    room = room_on_disk(plan, vocab_size)
    if room is None:
        return "their size is known when the model is loaded; the free disk space is not checked before"
    return f"{size(room.each_bytes)} each, at most {room.count} at once: {size(room.total_bytes)}"
