"""How devices share the packs of a step, and how to need less memory; neither changes the result."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from packhorse.errors import UserError
from packhorse.plan.compatibility import SHARDING_WEIGHTS, check_heads, check_pair, check_training_settings
from packhorse.plan.run_plan import BatchSplit, Decision, Device, RunPlan
from packhorse.plan.topology import with_mesh
from packhorse.recipe.rules.training import rule_findings
from packhorse.recipe.schema import BatchSection, Recipe

# In the order of the time that they cost.
SHARDING = ("zero2", "fsdp2", "zero3")
WHOLE_STATES = ("single", "ddp", "zero1")
# A forward pass of about this many tokens uses one device fully; more tokens only need more memory.
TOKENS_PER_PASS = 4096


def resolve_auto(recipe: Recipe, device: Device) -> Recipe:
    """Return the recipe without `auto` in `parallel.engine` and `parallel.checkpointing`, if no GPU is known.

    Raises:
        UserError: The run is on GPUs, whose memory is not known.
    """
    parallel = recipe.parallel
    auto = [name for name in ("engine", "checkpointing") if getattr(parallel, name) == "auto"]
    if not auto:
        return recipe
    if device == "cuda":
        fields = " and ".join(f"parallel.{name}" for name in auto)
        raise UserError(
            f"{fields} {'is' if len(auto) == 1 else 'are'} auto, and the GPU or the memory that the run needs is not"
            " known.",
            "auto chooses the fastest configuration that fits, from the profile of the GPU and the shape of the model.",
            f"name the GPU, for example packhorse plan RECIPE --gpus 8xH100-80GB, or set {fields}.",
        )
    # Host memory is plentiful, and all engines are equally fast on a CPU.
    values = {name: "ddp" if name == "engine" else False for name in auto}
    return recipe.changed("parallel", **values)


def split_batch(batch: BatchSection, data_ranks: int, sequence: int = 1) -> tuple[BatchSplit, Decision]:
    """Split `batch.packs` into data ranks x accumulation steps x micro packs; null packs complete the shares.

    Args:
        batch: Section of the recipe.
        data_ranks: Number of shares into which the packs of a step are divided.
        sequence: Number of processes that share each pack.

    Raises:
        UserError: There are fewer packs than shares, or `batch.micro` does not divide a share.
    """
    if batch.packs < data_ranks:
        raise UserError(
            f"batch.packs is {batch.packs}, and there are {_shares_in_words(data_ranks, sequence)}.",
            "at least one of them would have no pack in any step.",
            f"set batch.packs to {data_ranks}, or run fewer processes.",
        )
    share = math.ceil(batch.packs / data_ranks)
    micro, reason = _choose_micro(batch, share, sequence)
    split = BatchSplit(
        length_tokens=batch.length,
        packs_per_step=batch.packs,
        micro_packs=micro,
        accumulation_steps=share // micro,
    )
    return split, Decision(name="batch.micro", value=micro_words(split), reason=reason)


def null_packs_decision(batch: BatchSplit, data_ranks: int, sequence: int = 1) -> Decision | None:
    """Return how many packs of each step are empty, because the shares are not equal; None where none is."""
    num_null, num_all = batch.num_null_packs(data_ranks), data_ranks * batch.packs_per_rank
    if not num_null:
        return None
    value = f"{num_null} of {num_all} packs are empty: {num_null / num_all:.0%} waste"
    less, who = num_all - data_ranks, _shares_in_words(data_ranks, sequence)
    values = f"{less} or {num_all}" if less else str(num_all)
    reason = f"{who} cannot share {batch.packs_per_step} packs equally; the result is the same; {values} waste nothing"
    return Decision(name="batch.packs", value=value, reason=reason)


def _shares_in_words(data_ranks: int, sequence: int) -> str:
    return f"{data_ranks} processes" if sequence == 1 else f"{data_ranks} groups of {sequence} processes"


def micro_words(split: BatchSplit) -> str:
    """Return the packs of a pass and the passes of a step in words."""
    return f"{split.micro_packs} packs per pass, {split.accumulation_steps} passes per step"


def _choose_micro(batch: BatchSection, share: int, sequence: int) -> tuple[int, str]:
    if batch.micro == "auto":
        most = max(1, TOKENS_PER_PASS * sequence // batch.length)
        micro = max(n for n in range(1, min(most, share) + 1) if share % n == 0)
        shared = f" shared by {sequence}" * (sequence > 1)
        return micro, f"{micro} x {batch.length} tokens{shared} use a device fully (about {TOKENS_PER_PASS} are enough)"
    if share % batch.micro:
        fits = [n for n in range(1, share + 1) if share % n == 0]
        nearest = min(fits, key=lambda n: abs(n - int(batch.micro)))
        raise UserError(
            f"batch.micro is {batch.micro}, which does not divide the {share} packs of each process.",
            "each process runs its share of a step in passes of equal size.",
            f"set batch.micro to {nearest}, or to auto.",
        )
    return batch.micro, "batch.micro of the recipe"


def suggest_less_memory(plan: RunPlan) -> str:
    """Return the smallest change of the recipe that needs less memory per device, in the words of the recipe.

    Changes that keep the maths come first: fewer packs per pass, recomputed activations, more sharding, packs shared by
    devices. A change is returned only if the other settings of the plan allow it.
    """
    smaller = smaller_micro(plan)
    if smaller is not None and _allowed(plan, "batch", micro=smaller):
        passes = plan.batch.packs_per_rank // smaller
        return f"set batch.micro to {smaller}: {passes} passes per step, the same result"
    if plan.recipe.parallel.checkpointing is False and _allowed(plan, "parallel", checkpointing=True):
        return "set parallel.checkpointing to true: activations are recomputed in the backward pass, the same result"
    for engine in _engines(plan):
        if _allowed(plan, "parallel", engine=engine):
            return f"set parallel.engine to {engine}: it shards more over the devices, the same result"
    doubled = 2 * plan.topology.sequence
    if _allowed(plan, "parallel", sequence=doubled):
        return f"set parallel.sequence to {doubled}: {doubled} devices share each pack, the same result"
    kinds = {"full": "lora", "partial": "lora", "lora": "qlora"}
    method = kinds.get(plan.recipe.method.kind)
    return f"lower batch.length (it is {plan.batch.length_tokens}), or " + (
        f"set method to {method}" if method else "use devices with more memory"
    )


def smaller_micro(plan: RunPlan) -> int | None:
    """Return the next smaller number of packs per pass; None if it is already 1."""
    return next(smaller_micros(plan), None)


def smaller_micros(plan: RunPlan) -> Iterator[int]:
    """Yield numbers of packs per pass that divide a rank's packs, each at most half of the previous one, down to 1."""
    share, micro = plan.batch.packs_per_rank, plan.batch.micro_packs
    while micro > 1:
        micro = max(n for n in range(1, micro // 2 + 1) if share % n == 0)
        yield micro


def _engines(plan: RunPlan) -> Iterator[str]:
    """Yield engines that shard more than the engine of the plan."""
    engine = plan.topology.engine
    if plan.topology.world_size == 1 or engine in SHARDING_WEIGHTS:
        return
    yield from SHARDING if engine in WHOLE_STATES else SHARDING[1:]


def _allowed(plan: RunPlan, section: str, **fields: Any) -> bool:  # noqa: ANN401
    """Return whether a run with these fields of a section can be planned on the same devices."""
    try:
        recipe = plan.recipe.changed(section, **fields)
        update = {"engine": recipe.parallel.engine, "sequence": 1, "shard_group": None}
        topology = with_mesh(recipe.parallel, plan.topology.model_copy(update=update))
        check_pair(recipe, topology)
        check_heads(recipe, topology)
        batch, _ = split_batch(recipe.batch, topology.data_ranks, topology.sequence)
        check_training_settings(recipe, topology, batch, plan.num_steps)
    except UserError:
        return False
    return not rule_findings(recipe)
