"""Resume a run with other processes, another engine or smaller passes; the maths stays unchanged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from packhorse.durable import disk_error, replace_file
from packhorse.errors import UserError
from packhorse.plan.batch import micro_words, resolve_auto, smaller_micro
from packhorse.plan.command import deepspeed_config, launch_argv
from packhorse.plan.make_plan import plan_for_topology
from packhorse.plan.run_plan import Decision, RunPlan, Topology, leaves
from packhorse.plan.topology import DeviceRequest, Hardware, choose_topology, with_mesh
from packhorse.recipe.load import overridden_fields, override_recipe
from packhorse.recipe.schema import Recipe
from packhorse.run_folder.layout import PLAN_FILE, REPLACED_PLANS, first_free

MAY_CHANGE: Final = ("parallel", "batch.micro", "recovery", "checkpoint", "track")
"""Fields and sections that do not change the trained weights, except for rounding."""
DECISION: Final = "resume"


def replan(plan: RunPlan, overrides: Sequence[str], request: DeviceRequest, machine: Hardware, attempt: int) -> RunPlan:
    """Return the plan with another system side: same data, same packs in each step, same number of steps.

    Args:
        plan: Plan of the last attempt.
        overrides: Overrides of fields in `MAY_CHANGE`.
        request: GPUs and nodes that the command line requests; an empty request keeps those of the plan.
        machine: This machine.
        attempt: Number of the last attempt.

    Returns:
        The new plan, with a decision that lists the changes; `plan` itself if nothing changes.

    Raises:
        UserError: An override would change the maths, there are fewer packs than processes, or a combination of
            settings is not supported.
    """
    _refuse_other_maths(overrides, plan)
    recipe = resolve_auto(override_recipe(plan.recipe, overrides) if overrides else plan.recipe, plan.topology.device)
    topology, processes = _place(plan, recipe, overrides, request, machine)
    changes = [*_recipe_changes(plan.recipe, recipe), *_topology_changes(plan.topology, topology)]
    if not changes:
        return plan
    replanned = _limit_micro(plan_for_topology(recipe, topology, processes, plan.data, request.capability), plan)
    earlier = [decision for decision in plan.decisions if decision.name == DECISION]
    decision = Decision(
        name=DECISION,
        value=f"{topology.engine}, {topology.world_size} process{'es' * (topology.world_size > 1)}",
        reason=f"after attempt {attempt}: {', '.join(changes)}",
    )
    folder = Path(plan.run_folder)
    kept = {
        "run_folder": plan.run_folder,
        "base_model": plan.base_model,
        "teacher": plan.teacher,
        "argv": launch_argv(topology, folder),
    }
    return replanned.model_copy(update={**kept, "decisions": (*replanned.decisions, *earlier, decision)})


def _limit_micro(plan: RunPlan, before: RunPlan) -> RunPlan:
    """Return the plan with at most as many packs per pass as before, if they were chosen to fit into memory."""
    chosen_to_fit = before.predicted is not None and plan.recipe.batch.micro == "auto"
    # `in_backward` needs exactly one pass per step.
    if not chosen_to_fit or plan.recipe.optimizer.in_backward:
        return plan
    share = plan.batch.packs_per_rank
    micro = max(n for n in range(1, before.batch.micro_packs + 1) if share % n == 0)
    return plan if micro == plan.batch.micro_packs else with_micro(plan, micro, "at most as many as before")


def with_smaller_micro(plan: RunPlan) -> RunPlan | None:
    """Return the plan with half as many packs per pass in twice the passes: less memory, the same maths.

    None if passes cannot be smaller: they have one pack, or `optimizer.in_backward` needs a single pass.
    """
    batch, micro = plan.batch, smaller_micro(plan)
    if micro is None or plan.recipe.optimizer.in_backward:
        return None
    smaller = with_micro(plan, micro, f"{batch.micro_packs} packs per pass ran out of memory")
    return smaller.model_copy(update={"recipe": plan.recipe.changed("batch", micro=micro)})


def with_micro(plan: RunPlan, micro: int, reason: str) -> RunPlan:
    """Return the plan with this number of packs per pass; `batch.micro` of the recipe stays unchanged."""
    share = plan.batch.packs_per_rank
    batch = plan.batch.model_copy(update={"micro_packs": micro, "accumulation_steps": share // micro})
    decision = Decision(name="batch.micro", value=micro_words(batch), reason=reason)
    return plan.model_copy(
        update={
            "batch": batch,
            "deepspeed": deepspeed_config(plan.recipe, plan.topology, batch),
            "predicted": None,
            "decisions": tuple(decision if old.name == decision.name else old for old in plan.decisions),
        }
    )


def replace_plan(plan: RunPlan) -> Path:
    """Replace RUN/plan.json atomically; the earlier plan is kept as plan-1.json, plan-2.json ...

    Returns:
        The file that keeps the earlier plan.

    Raises:
        UserError: The folder cannot be written; the earlier plan is unchanged.
    """
    folder = Path(plan.run_folder)
    kept = first_free(folder, REPLACED_PLANS)
    _write(kept, (folder / PLAN_FILE).read_text(encoding="utf-8"))
    _write(folder / PLAN_FILE, plan.model_dump_json(indent=2) + "\n")
    return kept


def _write(path: Path, text: str) -> None:
    try:
        replace_file(path, text)
    except OSError as error:
        raise disk_error(path, error) from error


def _refuse_other_maths(overrides: Sequence[str], plan: RunPlan) -> None:
    for text, key in zip(overrides, overridden_fields(overrides), strict=True):
        if not any(key == field or key.startswith(f"{field}.") for field in MAY_CHANGE):
            raise UserError(
                f"the resumed run was given {text}.",
                f"a run resumes with the maths that it started with; only {', '.join(MAY_CHANGE)} may change.",
                f"remove {text}, or train the recipe under another name than {plan.recipe.name}.",
            )


def _place(
    plan: RunPlan, recipe: Recipe, overrides: Sequence[str], request: DeviceRequest, machine: Hardware
) -> tuple[Topology, Decision]:
    """Place the processes as before, unless the command line sets them: `auto` can differ on another machine."""
    if request.gpus is not None or request.on_cpus or "parallel.processes" in overridden_fields(overrides):
        return choose_topology(recipe.parallel, request, machine)
    same = plan.topology.model_copy(update={"engine": recipe.parallel.engine})
    processes = next(decision for decision in plan.decisions if decision.name == "processes")
    return with_mesh(recipe.parallel, same), processes


def _recipe_changes(before: Recipe, after: Recipe) -> Iterator[str]:
    old, new = dict(leaves(before.model_dump())), dict(leaves(after.model_dump()))
    for key, value in old.items():
        if value != new[key] and key != "parallel.processes":  # `_topology_changes` reports it
            yield f"{key} {value} -> {new[key]}"


def _topology_changes(before: Topology, after: Topology) -> Iterator[str]:
    if before.world_size != after.world_size:
        yield f"processes {before.world_size} -> {after.world_size}"
    if before.num_nodes != after.num_nodes:
        yield f"nodes {before.num_nodes} -> {after.num_nodes}"
    if before.device != after.device:
        yield f"device {before.device} -> {after.device}"
