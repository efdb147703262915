"""The smallest change of a plan that needs less memory on each device; none of these changes the maths."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from packhorse.errors import UserError
from packhorse.plan.batch import choose_batch
from packhorse.plan.compatibility import SHARDING_WEIGHTS, check_pair
from packhorse.plan.optimizer_pairs import check_stepping
from packhorse.plan.run_plan import RunPlan
from packhorse.plan.sequence import check_heads
from packhorse.plan.topology import with_mesh
from packhorse.recipe.rules import rule_findings

# From what costs the least time to what costs the most.
SHARDING = ("zero2", "fsdp2", "zero3")
WHOLE_STATES = ("single", "ddp", "zero1")


def less_memory(plan: RunPlan) -> str:
    """What to set, in the recipe's words: the first of these that the plan's other settings allow.

    Fewer packs a pass; activations recomputed; what every device holds whole, shared out; packs shared by devices.
    """
    smaller = smaller_micro(plan)
    if smaller is not None and _allowed(plan, "batch", micro=smaller):
        passes = plan.batch.micro_packs * plan.batch.accumulation_steps // smaller
        return f"set batch.micro to {smaller}: {passes} passes a step, the same result"
    if plan.recipe.parallel.checkpointing is False and _allowed(plan, "parallel", checkpointing=True):
        return "set parallel.checkpointing to true: activations are recomputed in the backward pass, the same result"
    for engine in _engines(plan):
        if _allowed(plan, "parallel", engine=engine):
            return f"set parallel.engine to {engine}: what each device holds whole is shared out, the same result"
    doubled = 2 * plan.topology.sequence
    if _allowed(plan, "parallel", sequence=doubled):
        return f"set parallel.sequence to {doubled}: each pack is shared by {doubled} devices, the same result"
    kinds = {"full": "lora", "partial": "lora", "lora": "qlora"}
    method = kinds.get(plan.recipe.method.kind)
    return f"lower batch.length (it is {plan.batch.length_tokens}), or " + (
        f"set method to {method}" if method else "use devices with more memory"
    )


def smaller_micro(plan: RunPlan) -> int | None:
    """Packs a pass, at most half of today's, that still share a step equally; None where there is one already."""
    return next(smaller_micros(plan), None)


def smaller_micros(plan: RunPlan) -> Iterator[int]:
    """Packs a pass that share a step equally, each at most half of the one before, down to one."""
    share, micro = plan.batch.micro_packs * plan.batch.accumulation_steps, plan.batch.micro_packs
    while micro > 1:
        micro = max(n for n in range(1, micro // 2 + 1) if share % n == 0)
        yield micro


def _engines(plan: RunPlan) -> Iterator[str]:
    """Engines that shard more than the plan's own, over as many devices."""
    engine = plan.topology.engine
    if plan.topology.world_size == 1 or engine in SHARDING_WEIGHTS:
        return
    yield from SHARDING if engine in WHOLE_STATES else SHARDING[1:]


def _allowed(plan: RunPlan, section: str, **fields: Any) -> bool:  # noqa: ANN401
    """Whether a run with these fields of a section could be planned on the same devices."""
    try:
        recipe = plan.recipe.changed(section, **fields)
        update = {"engine": recipe.parallel.engine, "sequence": 1, "shard_group": None}
        topology = with_mesh(recipe.parallel, plan.topology.model_copy(update=update))
        check_pair(recipe, topology)
        check_heads(recipe, topology)
        batch, _ = choose_batch(recipe.batch, topology.data_ranks, topology.sequence)
        check_stepping(recipe, topology, batch, plan.num_steps)
    except UserError:
        return False
    return not rule_findings(recipe)
