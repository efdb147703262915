"""Memory that a rank keeps from step to step: weights, float32 master weights, gradients and optimizer states.

Rajbhandari et al. 2020 (ZeRO, arXiv 1910.02054, section 5): each of R ranks keeps 1/R of the optimizer states (stage
1), also of the gradients (stage 2), also of the weights (stage 3). FSDP2 shards each weight along its first dimension;
DeepSpeed flattens the weight first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Final

from packhorse.estimate.weights import WeightTensor, compute_width
from packhorse.plan.run_plan import RunPlan

FP32: Final = 4
EIGHT_BIT_BLOCK: Final = 256
EIGHT_BIT_FROM: Final = 4096
"""Tensors with fewer elements have float32 states in bitsandbytes."""
ALL_LIVE: Final = 1_000_000_000
"""DeepSpeed's default of `stage3_max_live_parameters`, in elements."""
PERSISTING: Final = 100_000
"""DeepSpeed's default of `stage3_param_persistence_threshold`, in elements."""


@dataclass(frozen=True)
class Component:
    """One part of an amount of memory.

    Attributes:
        name: Name of the part, such as `weights`.
        bytes: Size in bytes.
        reason: Where the bytes come from, in one line.
    """

    name: str
    bytes: int
    reason: str


def total_bytes(components: Iterable[Component]) -> int:
    """Return the sum of the components' bytes."""
    return sum(component.bytes for component in components)


# --- how the engine shards --------------------------------------------------------------------------


def is_deepspeed(plan: RunPlan) -> bool:
    """Return whether the engine is DeepSpeed."""
    return plan.topology.engine.startswith("zero")


def shards_weights(plan: RunPlan) -> bool:
    """Return whether each rank keeps only a shard of every weight."""
    return plan.topology.engine in ("fsdp2", "hsdp") or plan.topology.engine.startswith("zero3")


def offloads(plan: RunPlan) -> bool:
    """Return whether weights and optimizer states are kept off the device."""
    return plan.topology.engine in ("zero3_offload", "zero3_nvme")


def shard_ranks(plan: RunPlan) -> int:
    """Return R, the number of ranks that keep one copy together."""
    topology = plan.topology
    return 1 if topology.engine in ("single", "ddp") else topology.shard_group or topology.world_size


def zero_settings(plan: RunPlan) -> dict[str, Any]:
    """Return `zero_optimization` of the plan's DeepSpeed JSON."""
    assert plan.deepspeed is not None
    settings: dict[str, Any] = plan.deepspeed["zero_optimization"]
    return settings


def shard_size(plan: RunPlan, weight: WeightTensor) -> int:
    """Return the stored elements of a weight on one rank."""
    if not shards_weights(plan) or weight.storage == "int8":
        return weight.data_size
    ranks = shard_ranks(plan)
    if is_deepspeed(plan):
        return -(-weight.data_size // ranks)
    rows = weight.data_shape[0]
    return -(-rows // ranks) * (weight.data_size // rows)


def shard_bytes(plan: RunPlan, weight: WeightTensor) -> int:
    """Return the stored bytes of a weight on one rank."""
    return shard_size(plan, weight) * (1 if weight.storage == "int8" else weight.width)


def split_persistent(plan: RunPlan, weights: Sequence[WeightTensor]) -> tuple[list[WeightTensor], list[WeightTensor]]:
    """Split weights into those that ZeRO-3 also keeps whole on every rank, because they are small, and the others."""
    if not plan.topology.engine.startswith("zero3"):
        return [], list(weights)
    limit = int(zero_settings(plan).get("stage3_param_persistence_threshold", PERSISTING))
    return [each for each in weights if each.data_size <= limit], [each for each in weights if each.data_size > limit]


# --- weights and optimizer states -------------------------------------------------------------------


def weight_components(plan: RunPlan, weights: Sequence[WeightTensor]) -> list[Component]:
    """Return the weights on the device between two steps, by component."""
    where = f"1/{shard_ranks(plan)} of each" if shards_weights(plan) else "whole on every rank"
    components = []
    for name, kind in (("weights", "base"), ("adapter", "adapter")):
        group = [weight for weight in weights if weight.kind == kind]
        if group and not offloads(plan):
            size = sum(weight.size for weight in group)
            reason = f"{size:,} weights in {_format_names(group)}, {where}"
            components.append(Component(name, sum(shard_bytes(plan, weight) for weight in group), reason))
    constants = sum(weight.constant_bytes for weight in weights)
    if constants:
        components.append(Component("quantisation constants", constants, "scales of quantised weights; never sharded"))
    persistent, _ = split_persistent(plan, weights)
    if persistent:
        size = sum(weight.data_size * weight.width for weight in persistent)
        reason = "small weights, whole on every rank (stage3_param_persistence_threshold)"
        components.append(Component("persistent weights", size, reason))
    return components


def _format_names(group: Iterable[WeightTensor]) -> str:
    names = {4: "float32", 2: "16 bit"}
    formats = {names[weight.width] if weight.storage == "plain" else weight.storage for weight in group}
    return " and ".join(sorted(formats))


def master_bytes(plan: RunPlan, weights: Sequence[WeightTensor]) -> int:
    """Return the bytes of the float32 master weights that DeepSpeed updates in place of the 16-bit ones."""
    # Also under fp32: stages 1 and 2 copy their parts. Stage 3 skips the copy only if it recognises its device's name.
    return FP32 * trained_share(plan, weights) if is_deepspeed(plan) else 0


def trained_share(plan: RunPlan, weights: Sequence[WeightTensor]) -> int:
    """Return the number of trained weights whose optimizer states one rank keeps."""
    trained = [weight for weight in weights if weight.trained]
    if shards_weights(plan):
        return sum(shard_size(plan, weight) for weight in trained)
    size = sum(weight.size for weight in trained)
    return -(-size // shard_ranks(plan)) if is_deepspeed(plan) else size


def optimizer_bytes(plan: RunPlan, weights: Sequence[WeightTensor]) -> int:
    """Return the bytes of one rank's optimizer states, wherever they are stored (docs/optimizers.md, per weight)."""
    name, trained = plan.recipe.optimizer.name, [weight for weight in weights if weight.trained]
    if name == "adafactor":
        return sum(state_width(plan, weight) * _rows_and_columns(weight.shape) for weight in trained)
    if name == "muon":
        return sum(
            (1 if uses_muon(weight) else 2) * shard_size(plan, weight) * state_width(plan, weight) for weight in trained
        )
    moments = 1 if name.startswith("lion") else 2
    if not name.endswith("8bit"):
        if is_deepspeed(plan):
            return moments * FP32 * trained_share(plan, weights)
        return moments * sum(shard_size(plan, weight) * state_width(plan, weight) for weight in trained)
    # Under ZeRO the weights are one flat tensor.
    sizes = [trained_share(plan, weights)] if is_deepspeed(plan) else [weight.size for weight in trained]
    return sum(moments * _eight_bit_bytes(size) for size in sizes)


def state_width(plan: RunPlan, weight: WeightTensor) -> int:
    """Return the bytes of one state element: torch's optimizers use the format of the weight that they update."""
    return FP32 if is_deepspeed(plan) else weight.width


def _eight_bit_bytes(size: int) -> int:
    """Return one byte per element and one float32 per block (Dettmers et al. 2021, arXiv 2110.02861)."""
    return FP32 * size if size < EIGHT_BIT_FROM else size + FP32 * -(-size // EIGHT_BIT_BLOCK)


def _rows_and_columns(shape: tuple[int, ...]) -> int:
    if len(shape) < 2:
        return prod(shape)
    return prod(shape[:-1]) + prod(shape[:-2]) * shape[-1]


def uses_muon(weight: WeightTensor) -> bool:
    """Return whether Muon updates a weight: a matrix of a layer, with one momentum. AdamW updates the others."""
    return len(weight.shape) == 2 and weight.unit.startswith("layer")


def uses_paging(plan: RunPlan) -> bool:
    """Return whether optimizer states move to host memory while the device is full."""
    return plan.recipe.optimizer.name.startswith("paged_")


# --- gradients --------------------------------------------------------------------------------------


def unreduced_gradient_bytes(plan: RunPlan, trained: Iterable[WeightTensor]) -> int:
    """Return the bytes of whole gradients as the backward pass produces them: DeepSpeed's in the compute format."""
    return sum(weight.size * (compute_width(plan) if is_deepspeed(plan) else weight.width) for weight in trained)


def accumulated_width(plan: RunPlan) -> int:
    """Return the bytes of one gradient element as ZeRO sums it over passes (`data_types` of the DeepSpeed JSON)."""
    assert plan.deepspeed is not None
    requested = plan.deepspeed.get("data_types", {}).get("grad_accum_dtype")
    return FP32 if requested == "fp32" else compute_width(plan)


def final_gradient_bytes(plan: RunPlan, weights: Sequence[WeightTensor]) -> int:
    """Return the bytes of gradients on one rank after the last backward pass of a step, without ZeRO-3's buffer."""
    trained = [weight for weight in weights if weight.trained]
    if plan.recipe.optimizer.in_backward:
        return max((weight.width * shard_size(plan, weight) for weight in trained), default=0)
    engine = plan.topology.engine
    if engine == "zero1":
        return accumulated_width(plan) * max(touched_by_rank(trained, shard_ranks(plan)))
    if engine == "zero2":
        return accumulated_width(plan) * trained_share(plan, weights)
    return 0 if engine.startswith("zero3") else sum(weight.width * shard_size(plan, weight) for weight in trained)


def touched_by_rank(trained: Sequence[WeightTensor], ranks: int) -> list[int]:
    """Return, for each rank under ZeRO-1, the elements of all weights that its flat partition contains a part of.

    In the last pass stage 1 frees the gradients that other ranks update, but the partition is a view, and a view keeps
    its whole tensor alive. Matrices and vectors (without weight decay) are two separate flat tensors.
    """
    touched = [0] * ranks
    matrices = [weight for weight in trained if len(weight.shape) > 1]
    vectors = [weight for weight in trained if len(weight.shape) < 2]
    for group in (matrices, vectors):
        share, offset = -(-sum(weight.size for weight in group) // ranks), 0
        for weight in group:
            for rank in range(offset // share, -(-(offset + weight.size) // share)):
                touched[rank] += weight.size
            offset += weight.size
    return touched


def waiting_gradient_bytes(plan: RunPlan, weights: Sequence[WeightTensor]) -> int:
    """Return the bytes of earlier passes' gradients on the device while a later pass of the step runs."""
    if plan.batch.accumulation_steps == 1:
        return 0
    trained = sum(weight.size for weight in weights if weight.trained)
    if plan.topology.engine in ("fsdp2", "hsdp"):
        # Not exchanged before the last pass: they stay whole on every rank, in the format they are reduced in.
        return FP32 * trained
    return compute_width(plan) * trained if plan.topology.engine == "zero1" else final_gradient_bytes(plan, weights)


def zero3_gradient_bytes(plan: RunPlan, weights: Sequence[WeightTensor]) -> int:
    """Return the bytes of ZeRO-3's buffer for this rank's share of the gradients, on the device or the host."""
    if not plan.topology.engine.startswith("zero3"):
        return 0
    return accumulated_width(plan) * sum(shard_size(plan, weight) for weight in weights if weight.trained)


# --- buffers ----------------------------------------------------------------------------------------


def update_buffer(plan: RunPlan, weights: Sequence[WeightTensor]) -> Component:
    """Return what exists in addition to gradients and states while the optimizer updates the weights."""
    trained = [weight for weight in weights if weight.trained]
    engine, share = plan.topology.engine, trained_share(plan, weights)
    if is_deepspeed(plan) and not offloads(plan):
        tile = min(share, int(zero_settings(plan).get("sub_group_size", ALL_LIVE)))
        in_place = engine == "zero2" and accumulated_width(plan) != compute_width(plan)
        size = 0 if in_place else FP32 * (tile if engine.startswith("zero3") else share)
        return Component("update buffer", size, "a flat float32 copy of this rank's gradients")
    largest = max((prod(weight.shape) for weight in trained), default=0)
    if plan.recipe.optimizer.name == "adafactor":
        return Component("update buffer", 2 * FP32 * largest, "Adafactor's update of the largest matrix")
    if plan.recipe.optimizer.name == "muon":
        return Component("update buffer", 4 * 2 * largest, "Newton-Schulz on the largest matrix, in bfloat16")
    return Component("update buffer", 0, "updated in place")


def reduce_buckets(plan: RunPlan, weights: Sequence[WeightTensor]) -> list[Component]:
    """Return the buckets that gradients are sent in, as DDP and the DeepSpeed JSON size them."""
    engine = plan.topology.engine
    if engine == "ddp":
        reason = "DDP's buckets: a copy of every gradient (gradient_as_bucket_view is off)"
        size = unreduced_gradient_bytes(plan, (weight for weight in weights if weight.trained))
        return [Component("reduce buckets", size, reason)]
    if not is_deepspeed(plan):
        return []
    settings, width = zero_settings(plan), compute_width(plan)
    size = int(settings["reduce_bucket_size"]) * width
    if engine.startswith("zero3"):
        return [Component("reduce buckets", size, f"reduce_bucket_size x {width} bytes")]
    number = 2 if settings.get("overlap_comm") else 1
    return [Component("reduce buckets", number * size, f"{number} x reduce_bucket_size x {width} bytes")]
