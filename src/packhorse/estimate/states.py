"""What a rank keeps from step to step, by engine: weights, masters, gradients, optimizer states.

Rajbhandari et al. 2020 (ZeRO, arXiv 1910.02054, section 5): of R ranks each keeps 1/R of the optimizer states (stage
1), of the gradients too (2), of the weights too (3). FSDP2 cuts each weight along its first dimension, DeepSpeed
flattens it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from typing import Any, Final

from packhorse.estimate.component import Component
from packhorse.estimate.held import Held
from packhorse.plan.run_plan import RunPlan

FP32: Final = 4
EIGHT_BIT_BLOCK: Final = 256
EIGHT_BIT_FROM: Final = 4096
"""bitsandbytes keeps states of fewer values in float32."""
ALL_LIVE: Final = 1_000_000_000
"""DeepSpeed's default of `stage3_max_live_parameters`."""
PERSISTING: Final = 100_000
"""DeepSpeed's default of `stage3_param_persistence_threshold`, in elements."""


def is_deepspeed(plan: RunPlan) -> bool:
    """Whether DeepSpeed shards."""
    return plan.topology.engine.startswith("zero")


def cuts_weights(plan: RunPlan) -> bool:
    """Whether each rank keeps a part of every weight."""
    return plan.topology.engine in ("fsdp2", "hsdp") or plan.topology.engine.startswith("zero3")


def offloads(plan: RunPlan) -> bool:
    """Whether weights and optimizer states are kept off the device."""
    return plan.topology.engine in ("zero3_offload", "zero3_nvme")


def shard_ranks(plan: RunPlan) -> int:
    """R, the ranks that keep one copy together."""
    topology = plan.topology
    return 1 if topology.engine in ("single", "ddp") else topology.shard_group or topology.world_size


def zero_settings(plan: RunPlan) -> dict[str, Any]:
    """`zero_optimization` of the DeepSpeed JSON that will run."""
    assert plan.deepspeed is not None
    settings: dict[str, Any] = plan.deepspeed["zero_optimization"]
    return settings


def own_size(plan: RunPlan, held: Held) -> int:
    """Elements of a weight's part on a rank, as it is stored."""
    ranks, shape = shard_ranks(plan), held.data_shape
    if not cuts_weights(plan) or held.storage == "int8":
        return prod(shape)
    if is_deepspeed(plan):
        return -(-prod(shape) // ranks)
    return -(-shape[0] // ranks) * prod(shape[1:])


def own_bytes(plan: RunPlan, held: Held) -> int:
    """Bytes of a weight's part on a rank."""
    return own_size(plan, held) * (1 if held.storage == "int8" else held.width)


def by_persistence(plan: RunPlan, held: Sequence[Held]) -> tuple[list[Held], list[Held]]:
    """Weights that ZeRO-3 keeps whole on every rank beside their parts, because they are small; and all others."""
    if not plan.topology.engine.startswith("zero3"):
        return [], list(held)
    limit = int(zero_settings(plan).get("stage3_param_persistence_threshold", PERSISTING))
    whole: list[Held] = []
    others: list[Held] = []
    for each in held:
        (whole if prod(each.data_shape) <= limit else others).append(each)
    return whole, others


def weights(plan: RunPlan, held: Sequence[Held]) -> list[Component]:
    """Weights on the device between two steps."""
    base = [each for each in held if each.kind == "base"]
    adapter = [each for each in held if each.kind == "adapter"]
    where = f"1/{shard_ranks(plan)} of each" if cuts_weights(plan) else "whole on every rank"
    components = []
    for name, group in (("weights", base), ("adapter", adapter)):
        if group and not offloads(plan):
            size = sum(each.size for each in group)
            reason = f"{size:,} weights in {_widths(group)}, {where}"
            components.append(Component(name, sum(own_bytes(plan, each) for each in group), reason))
    constants = sum(each.constant_bytes for each in held)
    if constants:
        components.append(Component("quantisation constants", constants, "scales of the packed weights; never sharded"))
    small, _ = by_persistence(plan, held)
    if small:
        size = sum(prod(each.data_shape) * each.width for each in small)
        reason = "small weights, whole on every rank (stage3_param_persistence_threshold)"
        components.append(Component("persistent weights", size, reason))
    return components


def _widths(group: Iterable[Held]) -> str:
    names = {4: "float32", 2: "16 bit"}
    found = {names[each.width] if each.storage == "plain" else each.storage for each in group}
    return " and ".join(sorted(found))


def masters(plan: RunPlan, held: Sequence[Held]) -> int:
    """Bytes of the weights that DeepSpeed steps in place of those that it computes with."""
    # Under fp32 too: stages 1 and 2 copy their parts, and stage 3 would not only if it knew its own device's name.
    return FP32 * trained_share(plan, held) if is_deepspeed(plan) else 0


def trained_share(plan: RunPlan, held: Sequence[Held]) -> int:
    """Trained weights whose states this rank keeps."""
    trained = [each for each in held if each.trained]
    if cuts_weights(plan):
        return sum(own_size(plan, each) for each in trained)
    size = sum(each.size for each in trained)
    return -(-size // shard_ranks(plan)) if is_deepspeed(plan) else size


def optimizer_states(plan: RunPlan, held: Sequence[Held]) -> int:
    """Bytes that the optimizer keeps on a rank, wherever they lie; docs/optimizers.md has them for each weight."""
    section, trained = plan.recipe.optimizer, [each for each in held if each.trained]
    name = section.name
    if name == "adafactor":
        return sum(state_width(plan, each) * _rows_and_columns(each.shape) for each in trained)
    if name == "muon":
        return sum((1 if by_muon(each) else 2) * own_size(plan, each) * state_width(plan, each) for each in trained)
    moments = 1 if name.startswith("lion") else 2
    if not name.endswith("8bit"):
        if is_deepspeed(plan):
            return moments * FP32 * trained_share(plan, held)
        return moments * sum(own_size(plan, each) * state_width(plan, each) for each in trained)
    # Under ZeRO the weights are one flat piece.
    parts = [trained_share(plan, held)] if is_deepspeed(plan) else [each.size for each in trained]
    return sum(moments * _eight_bits(size) for size in parts)


def state_width(plan: RunPlan, held: Held) -> int:
    """Bytes of a number of torch's optimizers, which are kept in the format of the weights that they step."""
    return FP32 if is_deepspeed(plan) else held.width


def _eight_bits(size: int) -> int:
    """Dettmers et al. 2021 (arXiv 2110.02861): a byte a value and a float32 a block."""
    return FP32 * size if size < EIGHT_BIT_FROM else size + FP32 * -(-size // EIGHT_BIT_BLOCK)


def _rows_and_columns(shape: tuple[int, ...]) -> int:
    if len(shape) < 2:
        return prod(shape)
    return prod(shape[:-1]) + prod(shape[:-2]) * shape[-1]


def by_muon(held: Held) -> bool:
    """Whether Muon steps it: a matrix of a layer, with one momentum; AdamW the others, with two."""
    return len(held.shape) == 2 and held.unit.startswith("layer")


def pages(plan: RunPlan) -> bool:
    """Whether optimizer states move to host memory while the device is full."""
    return plan.recipe.optimizer.name.startswith("paged_")


def gradient_width(plan: RunPlan) -> int:
    """Bytes of a gradient as DeepSpeed's backward pass leaves it."""
    return 2 if plan.recipe.precision != "fp32" else FP32


def whole_gradients(plan: RunPlan, trained: Iterable[Held]) -> int:
    """Bytes of gradients that nothing has shared out yet, as the backward pass leaves them."""
    return sum(each.size * (gradient_width(plan) if is_deepspeed(plan) else each.width) for each in trained)


def added_width(plan: RunPlan) -> int:
    """Bytes of a gradient as ZeRO adds it up over the passes: `data_types` of the DeepSpeed JSON."""
    assert plan.deepspeed is not None
    asked = plan.deepspeed.get("data_types", {}).get("grad_accum_dtype")
    return FP32 if asked == "fp32" else gradient_width(plan)


def final_gradients(plan: RunPlan, held: Sequence[Held]) -> int:
    """Bytes of gradients that a rank holds at the end of a step's last backward pass, beside ZeRO-3's own buffer."""
    trained = [each for each in held if each.trained]
    if plan.recipe.optimizer.in_backward:
        return max((each.width * own_size(plan, each) for each in trained), default=0)
    engine = plan.topology.engine
    if engine == "zero1":
        return added_width(plan) * max(touched_by_rank(trained, shard_ranks(plan)))
    if engine == "zero2":
        return added_width(plan) * trained_share(plan, held)
    return 0 if engine.startswith("zero3") else sum(each.width * own_size(plan, each) for each in trained)


def touched_by_rank(trained: Sequence[Held], ranks: int) -> list[int]:
    """Weights that each rank's part of the flat rows has any of: ZeRO-1 steps its part of them, by views of gradients.

    In the last pass stage 1 too gives up what other ranks step, and a view keeps the whole of what it looks at. There
    is a row of matrices and one of vectors, which do not decay.
    """
    touched = [0] * ranks
    for row in ([each for each in trained if len(each.shape) > 1], [each for each in trained if len(each.shape) < 2]):
        share, offset = -(-sum(each.size for each in row) // ranks), 0
        for each in row:
            for rank in range(offset // share, -(-(offset + each.size) // share)):
                touched[rank] += each.size
            offset += each.size
    return touched


def waiting_gradients(plan: RunPlan, held: Sequence[Held]) -> int:
    """Bytes of gradients that lie on the device while a later pass of the same step runs."""
    if plan.batch.accumulation_steps == 1:
        return 0
    trained = sum(each.size for each in held if each.trained)
    if plan.topology.engine in ("fsdp2", "hsdp"):
        # Not exchanged before the last pass, they stay whole on every rank, in the format they are reduced in.
        return FP32 * trained
    return gradient_width(plan) * trained if plan.topology.engine == "zero1" else final_gradients(plan, held)


def kept_gradients(plan: RunPlan, held: Sequence[Held]) -> int:
    """Bytes of the buffer that ZeRO-3 keeps for its part of the gradients, on the device or the host."""
    if not plan.topology.engine.startswith("zero3"):
        return 0
    return added_width(plan) * sum(own_size(plan, each) for each in held if each.trained)


def step_room(plan: RunPlan, held: Sequence[Held]) -> Component:
    """What exists beside gradients and states while weights are stepped."""
    trained = [each for each in held if each.trained]
    engine, share = plan.topology.engine, trained_share(plan, held)
    if is_deepspeed(plan) and not offloads(plan):
        tile = min(share, int(zero_settings(plan).get("sub_group_size", ALL_LIVE)))
        in_place = engine == "zero2" and added_width(plan) != gradient_width(plan)
        size = 0 if in_place else FP32 * (tile if engine.startswith("zero3") else share)
        return Component("step room", size, "this rank's gradients once more, flat and in float32")
    largest = max((prod(each.shape) for each in trained), default=0)
    if plan.recipe.optimizer.name == "adafactor":
        return Component("step room", 2 * FP32 * largest, "Adafactor's update of the largest matrix")
    if plan.recipe.optimizer.name == "muon":
        return Component("step room", 4 * 2 * largest, "Newton-Schulz on the largest matrix, in bfloat16")
    return Component("step room", 0, "stepped in place")


def buckets(plan: RunPlan, held: Sequence[Held]) -> list[Component]:
    """Room for what is sent: buckets of gradients, as DDP and the DeepSpeed JSON have them."""
    engine = plan.topology.engine
    if engine == "ddp":
        reason = "DDP's buckets: a copy of every gradient (gradient_as_bucket_view is off)"
        return [Component("reduce buckets", whole_gradients(plan, (each for each in held if each.trained)), reason)]
    if not is_deepspeed(plan):
        return []
    settings, width = zero_settings(plan), gradient_width(plan)
    size = int(settings["reduce_bucket_size"]) * width
    if engine.startswith("zero3"):
        return [Component("reduce buckets", size, f"reduce_bucket_size x {width} bytes")]
    number = 2 if settings.get("overlap_comm") else 1
    return [Component("reduce buckets", number * size, f"{number} x reduce_bucket_size x {width} bytes")]
