"""Host memory of a node and disk space: what loading, offload, saving and checkpoints need."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from math import prod
from typing import Final

from packhorse.estimate import training_state
from packhorse.estimate.activations import count_activations
from packhorse.estimate.checkpoint_size import copies_bytes, space_of
from packhorse.estimate.packs import PackFigures
from packhorse.estimate.teacher import stored_bytes
from packhorse.estimate.training_state import ALL_LIVE, FP32, Component, total_bytes
from packhorse.estimate.weights import WIDTHS, WeightTensor, compute_width
from packhorse.model_spec.parameters import Shape
from packhorse.plan.run_plan import RunPlan
from packhorse.run_folder.checkpoints.pinned_slabs import pinned_bytes

# Python with torch, transformers, peft and their CUDA libraries: 1.6 to 2.4 GB resident on Linux; an assumption.
PROCESS_BYTES: Final = 2_000_000_000
TOKEN_BYTES: Final = 5
"""A token on disk: its id in at most 4 bytes, and its loss mask."""
BATCH_BYTES: Final = 4 * 8
"""A token of a batch: id, position, and the index and target of its label, in 64 bits each."""
BATCHES: Final = 3
"""Steps that `data/packs/loader.py` holds: the current one and the next two."""
PINNING: Final = "torch rounds pinned memory up to powers of two; parts that DeepSpeed joins exist twice"


@dataclass(frozen=True)
class StorageEstimate:
    """Memory and disk space of a run outside its devices.

    Attributes:
        host: Memory of one node, by component, at its fullest moment.
        disk: Space below the runs folder.
        local_disk: Space below `parallel.nvme` on each node.
    """

    host: tuple[Component, ...]
    disk: tuple[Component, ...]
    local_disk: tuple[Component, ...]

    @property
    def host_bytes(self) -> int:
        """Memory of one node."""
        return total_bytes(self.host)


def estimate_storage(
    plan: RunPlan, shape: Shape, weights: tuple[WeightTensor, ...], packs: PackFigures
) -> StorageEstimate:
    """Count host memory and disk space.

    Args:
        plan: Plan of the run.
        shape: Shape of its model.
        weights: Result of `list_weights`.
        packs: Its training packs.
    """
    ranks = plan.topology.processes_per_node
    host = (
        Component("processes", ranks * PROCESS_BYTES, f"{ranks} x Python, torch and its libraries; an assumption"),
        *_offloaded(plan, weights),
        *_activations(plan, shape, weights, packs),
        _batches(plan, packs),
        # Loading and saving never coincide.
        max(_loading(plan, weights), _saving(plan, weights), key=lambda part: part.bytes),
    )
    teacher = Component("teacher", stored_bytes(plan), "its most probable tokens, stored once beside the data")
    disk = (_checkpoints(plan, weights), _result(plan, weights), _store(plan, packs), teacher)
    local = _states(plan, weights, "the ranks' parts") if plan.topology.engine == "zero3_nvme" else ()
    return StorageEstimate(*(tuple(part for part in parts if part.bytes) for parts in (host, disk, local)))


def _offloaded(plan: RunPlan, weights: tuple[WeightTensor, ...]) -> list[Component]:
    """Return what all ranks of the node keep on the host; DeepSpeed pins what it offloads."""
    ranks = plan.topology.processes_per_node
    parts = []
    if training_state.uses_paging(plan):
        size = ranks * training_state.optimizer_bytes(plan, weights)
        parts.append(Component("optimizer states", size, "paged out while the devices are full"))
    if not training_state.offloads(plan):
        return parts
    gradients = ranks * training_state.zero3_gradient_bytes(plan, weights)
    parts.append(Component("gradients", gradients, "the ranks' parts, pinned"))
    share = training_state.trained_share(plan, weights)
    if plan.topology.engine == "zero3_offload":
        reason = "the ranks' parts once more in float32, for the update, pinned"
        return [
            *parts,
            *_states(plan, weights, "the ranks' parts, pinned"),
            Component("step gradients", ranks * FP32 * share, reason),
            Component("pinning", ranks * _pinning(plan, weights), PINNING),
        ]
    swap = training_state.zero_settings(plan)["offload_param"]
    size = ranks * int(swap["buffer_size"]) * int(swap["buffer_count"]) * compute_width(plan)
    # Two sets, so that one is read while the other is updated: weight, two states and gradient in float32.
    buffers = ranks * 2 * 4 * FP32 * min(share, ALL_LIVE)
    return [
        *parts,
        Component("swap buffers", size, "buffer_count x buffer_size of the DeepSpeed JSON, pinned"),
        Component("step buffers", buffers, "what is updated at a time, read and written"),
    ]


def _pinning(plan: RunPlan, weights: tuple[WeightTensor, ...]) -> int:
    """Return what pinned memory takes on one rank in addition to the data in it.

    DeepSpeed pins each weight's part separately (`partition_parameters.py`), then all trained ones as one tensor
    (`stage3.py`); torch keeps the memory of the former. Read in DeepSpeed 0.19 and torch 2.13, not measured.
    """
    if plan.topology.device == "cpu":
        return 0
    _, sharded = training_state.split_persistent(plan, weights)
    own = [(weight.trained, training_state.shard_bytes(plan, weight)) for weight in sharded]
    flat = sum(size for trained, size in own if trained)
    tiles, rest = divmod(training_state.trained_share(plan, weights), ALL_LIVE)
    pinned = [size for _, size in own] + [flat, training_state.zero3_gradient_bytes(plan, weights)]
    pinned += [FP32 * ALL_LIVE] * tiles + [FP32 * rest]
    return sum(pinned_bytes(size) for size in pinned) - (sum(pinned) - flat)


def _states(plan: RunPlan, weights: tuple[WeightTensor, ...], reason: str) -> list[Component]:
    """Return weights and optimizer states of all ranks of a node, where they are kept off the devices."""
    ranks = plan.topology.processes_per_node
    own = sum(training_state.shard_bytes(plan, weight) for weight in weights)
    states = training_state.master_bytes(plan, weights) + training_state.optimizer_bytes(plan, weights)
    return [
        Component("weights", ranks * own, reason),
        Component("optimizer states", ranks * states, "float32 weights and their states"),
    ]


def _batches(plan: RunPlan, packs: PackFigures) -> Component:
    """Return the batches that wait; each rank of a sequence group lays out the whole packs."""
    tokens = math.ceil(plan.batch.packs_per_rank * packs.tokens_mean)
    size = plan.topology.processes_per_node * BATCHES * BATCH_BYTES * tokens
    return Component("batches", size, "the current step and the next two, for each process")


def _activations(plan: RunPlan, shape: Shape, weights: tuple[WeightTensor, ...], packs: PackFigures) -> list[Component]:
    if not plan.recipe.parallel.offload_activations:
        return []
    on_host = count_activations(plan, shape, weights, packs).on_host * plan.topology.processes_per_node
    return [Component("activations", on_host, "inputs of recomputed layers, pinned")]


def _loading(plan: RunPlan, weights: tuple[WeightTensor, ...]) -> Component:
    width, ranks = WIDTHS[plan.chosen("model.dtype")], plan.topology.processes_per_node
    if plan.recipe.model.config is not None and training_state.shards_weights(plan):
        whole = sum(weight.size for weight in weights if weight.kind == "base") * width * ranks
        return Component("loading", whole, "a fresh model, which each process initialises whole before sharding")
    units: Counter[str] = Counter()
    for weight in weights:
        units[weight.unit] += weight.size * width
    reason = "one unit per process; the system can drop pages of the mapped files"
    return Component("loading", max(units.values()) * ranks, reason)


def _saving(plan: RunPlan, weights: tuple[WeightTensor, ...]) -> Component:
    asynchronous = plan.recipe.checkpoint.asynchronous
    reason = "copies for checkpoints, kept from save to save" if asynchronous else "what is being written"
    return Component("saving", copies_bytes(plan, weights), f"{reason}, and the trained weights at the end")


def _checkpoints(plan: RunPlan, weights: tuple[WeightTensor, ...]) -> Component:
    space = space_of(plan, weights)
    reason = f"at most {space.count} at once, {space.each_bytes:,} bytes each: weights and optimizer states"
    return Component("checkpoints", space.total_bytes, reason)


def _result(plan: RunPlan, weights: tuple[WeightTensor, ...]) -> Component:
    """Return the trained model or adapter, which is written before the one of an earlier attempt is removed."""
    if plan.recipe.method.trains_base:
        size = sum(weight.size for weight in weights) * compute_width(plan)
    else:
        size = sum(prod(weight.shape) for weight in weights if weight.trained) * FP32
    return Component("result", size, "the trained model or adapter")


def _store(plan: RunPlan, packs: PackFigures) -> Component:
    tokens = plan.data.num_tokens if plan.data else int((packs.num_packs or 0) * packs.tokens_mean)
    return Component("data store", tokens * TOKEN_BYTES, f"{tokens:,} tokens with their loss masks")
