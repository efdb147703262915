"""Going on with a run elsewhere: other processes, another engine, smaller passes; the maths stay as they were."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from packhorse.durable import disk_error, replace_file
from packhorse.errors import UserError
from packhorse.plan.batch import settled
from packhorse.plan.command import deepspeed_config, launch_argv
from packhorse.plan.difference import leaves
from packhorse.plan.hardware import Hardware
from packhorse.plan.less_memory import smaller_micro
from packhorse.plan.make_plan import plan_on
from packhorse.plan.run_plan import Decision, RunPlan, Topology
from packhorse.plan.topology import Ask, choose_topology, with_mesh
from packhorse.recipe.layers import parse_override
from packhorse.recipe.load import override_recipe
from packhorse.recipe.schema import Recipe
from packhorse.run_folder.layout import PLAN_FILE, REPLACED_PLANS, numbered

MAY_CHANGE: Final = ("parallel", "batch.micro", "recovery", "checkpoint", "track")
"""Fields and sections that no weight of the result depends on, but for rounding."""
DECISION: Final = "resume"


def replan(plan: RunPlan, overrides: Sequence[str], ask: Ask, here: Hardware, attempt: int) -> RunPlan:
    """The plan with another system side: same data, same packs in each step, same number of steps.

    Args:
        plan: As the run went so far.
        overrides: Of fields in `MAY_CHANGE`.
        ask: GPUs and nodes that the command line asks for; none: as before.
        here: This machine.
        attempt: Number of the last attempt.

    Returns:
        The new plan, which says what changed; the very same one where nothing does.

    Raises:
        UserError: An override would change what is learned; or the processes cannot share the batch, or do not go with
            the engine, the method or the optimizer.
    """
    _refuse_other_maths(overrides, plan)
    recipe = settled(override_recipe(plan.recipe, overrides) if overrides else plan.recipe, plan.topology.device)
    topology, processes = _place(plan, recipe, overrides, ask, here)
    changes = [*_differences(plan.recipe, recipe), *_moved(plan.topology, topology)]
    if not changes:
        return plan
    made = _no_fuller(plan_on(recipe, topology, processes, plan.data), plan)
    said = Decision(
        name=DECISION,
        value=f"{topology.engine}, {topology.world_size} process{'es' * (topology.world_size > 1)}",
        reason=f"after attempt {attempt}: {', '.join(changes)}",
    )
    folder = Path(plan.run_folder)
    own = {"run_folder": plan.run_folder, "base_model": plan.base_model, "argv": launch_argv(topology, folder)}
    return made.model_copy(update={**own, "decisions": (*made.decisions, *_said_before(plan), said)})


def _no_fuller(made: RunPlan, before: RunPlan) -> RunPlan:
    """Passes that were chosen to fit stay as they are, or as near below as the new share of a process allows."""
    chosen = before.predicted is not None and made.recipe.batch.micro == "auto"
    # Weights that are stepped in the backward pass take one pass a step, whatever it holds.
    if not chosen or made.recipe.optimizer.in_backward:
        return made
    share = made.batch.micro_packs * made.batch.accumulation_steps
    micro = max(n for n in range(1, before.batch.micro_packs + 1) if share % n == 0)
    return made if micro == made.batch.micro_packs else with_micro(made, micro, "as before, or less")


def with_smaller_micro(plan: RunPlan) -> RunPlan | None:
    """The plan with half as many packs in a pass and twice the passes: less memory, the same maths.

    None where passes cannot be made smaller: they hold one pack, or each weight is stepped in the only one.
    """
    batch, micro = plan.batch, smaller_micro(plan)
    if micro is None or plan.recipe.optimizer.in_backward:
        return None
    smaller = with_micro(plan, micro, f"{batch.micro_packs} packs a pass ran out of memory")
    return smaller.model_copy(update={"recipe": plan.recipe.changed("batch", micro=micro)})


def with_micro(plan: RunPlan, micro: int, reason: str) -> RunPlan:
    """The plan with so many packs in a pass; the recipe's own word stays."""
    share = plan.batch.micro_packs * plan.batch.accumulation_steps
    batch = plan.batch.model_copy(update={"micro_packs": micro, "accumulation_steps": share // micro})
    value = f"{micro} packs a pass, {share // micro} passes a step"
    return plan.model_copy(
        update={
            "batch": batch,
            "deepspeed": deepspeed_config(plan.recipe, plan.topology, batch),
            "predicted": None,
            "decisions": tuple(
                Decision(name=each.name, value=value, reason=reason) if each.name == "batch.micro" else each
                for each in plan.decisions
            ),
        }
    )


def replace_plan(plan: RunPlan) -> Path:
    """Puts the plan in the place of RUN/plan.json, in one move; the earlier one is kept as plan-1.json, plan-2.json …

    Returns:
        Where the earlier one is kept.

    Raises:
        UserError: The folder cannot be written; the earlier plan stands.
    """
    folder = Path(plan.run_folder)
    number = 1
    while (kept := folder / numbered(REPLACED_PLANS, number)).exists():
        number += 1
    _write(kept, (folder / PLAN_FILE).read_text(encoding="utf-8"))
    _write(folder / PLAN_FILE, plan.model_dump_json(indent=2) + "\n")
    return kept


def _write(path: Path, text: str) -> None:
    try:
        replace_file(path, text)
    except OSError as error:
        raise disk_error(path, error) from error


def _refuse_other_maths(overrides: Sequence[str], plan: RunPlan) -> None:
    for text in overrides:
        key = ".".join(parse_override(text).keys)
        if not any(key == field or key.startswith(f"{field}.") for field in MAY_CHANGE):
            raise UserError(
                f"--resume came with {text}.",
                f"a run goes on with the maths that it began with; {', '.join(MAY_CHANGE)} may change.",
                f"leave it out, or train the recipe under another name than {plan.recipe.name}.",
            )


def _place(
    plan: RunPlan, recipe: Recipe, overrides: Sequence[str], ask: Ask, here: Hardware
) -> tuple[Topology, Decision]:
    """As before, unless the command line speaks of processes: `auto` may mean other ones on another machine."""
    keys = {parse_override(text).keys for text in overrides}
    if ask.gpus is not None or ask.on_cpus or ("parallel", "processes") in keys:
        return choose_topology(recipe.parallel, ask, here)
    same = plan.topology.model_copy(update={"engine": recipe.parallel.engine})
    why = next(decision for decision in plan.decisions if decision.name == "processes")
    return with_mesh(recipe.parallel, same), why


def _differences(before: Recipe, after: Recipe) -> Iterator[str]:
    old, new = dict(leaves(before.model_dump())), dict(leaves(after.model_dump()))
    for key, value in old.items():
        if value != new[key] and key != "parallel.processes":  # told by the number of processes
            yield f"{key} {value} -> {new[key]}"


def _moved(before: Topology, after: Topology) -> Iterator[str]:
    if before.world_size != after.world_size:
        yield f"processes {before.world_size} -> {after.world_size}"
    if before.num_nodes != after.num_nodes:
        yield f"nodes {before.num_nodes} -> {after.num_nodes}"
    if before.device != after.device:
        yield f"device {before.device} -> {after.device}"


def _said_before(plan: RunPlan) -> list[Decision]:
    return [decision for decision in plan.decisions if decision.name == DECISION]
