"""Host memory of a node and room on disk: what loading, offload, saving and checkpoints take."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Final

from packhorse.plan.cost import states
from packhorse.plan.cost.activations import count_activations
from packhorse.plan.cost.component import Component, total_bytes
from packhorse.plan.cost.held import WIDTHS, Held, compute_width, held_weights
from packhorse.plan.cost.packs import PackFigures
from packhorse.plan.parameters import Shape
from packhorse.plan.run_plan import RunPlan

FP32: Final = 4
# Python with torch, transformers, peft and their CUDA libraries: 1.6 to 2.4 GB resident on Linux; an assumption.
PROCESS_BYTES: Final = 2_000_000_000
TOKEN_BYTES: Final = 5
"""A token on disk: its id in 4 bytes at most, and its mask."""


@dataclass(frozen=True)
class StorageEstimate:
    """What a run takes beside its devices.

    Attributes:
        host: Memory of one node, by component, at its fullest moment.
        disk: Room below the runs folder.
        local_disk: Room below `parallel.nvme` on each node.
    """

    host: tuple[Component, ...]
    disk: tuple[Component, ...]
    local_disk: tuple[Component, ...]

    @property
    def host_bytes(self) -> int:
        """Memory of one node."""
        return total_bytes(self.host)

    @property
    def disk_bytes(self) -> int:
        """Room below the runs folder."""
        return total_bytes(self.disk)


def estimate_storage(plan: RunPlan, shape: Shape, packs: PackFigures) -> StorageEstimate | None:
    """Counts host memory and disk.

    Args:
        plan: Of the run.
        shape: Of its model.
        packs: That it trains on.

    Returns:
        None where only the library knows what the method trains.
    """
    held = held_weights(plan, shape)
    if held is None:
        return None
    host = (*_processes(plan), *_offloaded(plan, held), *_activations(plan, shape, held, packs), *_fullest(plan, held))
    disk = (*_checkpoints(plan, held), *_result(plan, held), *_store(plan, packs))
    local = _nvme(plan, held)
    return StorageEstimate(*(tuple(part for part in parts if part.bytes) for parts in (host, disk, local)))


def _processes(plan: RunPlan) -> list[Component]:
    number = plan.topology.processes_per_node
    reason = f"{number} x Python, torch and its libraries; an assumption"
    return [Component("processes", number * PROCESS_BYTES, reason)]


def _offloaded(plan: RunPlan, held: tuple[Held, ...]) -> list[Component]:
    """Of all ranks of the node; DeepSpeed pins what it offloads."""
    ranks = plan.topology.processes_per_node
    parts = []
    if states.pages(plan):
        size = ranks * states.optimizer_states(plan, held)
        parts.append(Component("optimizer states", size, "paged out while the devices are full"))
    if not states.offloads(plan):
        return parts
    gradients = ranks * states.kept_gradients(plan, held)
    parts.append(Component("gradients", gradients, "the ranks' parts, pinned"))
    if plan.topology.engine == "zero3_offload":
        weights = ranks * sum(states.own_bytes(plan, each) for each in held)
        stepped = ranks * (states.masters(plan, held) + states.optimizer_states(plan, held))
        parts.append(Component("weights", weights, "the ranks' parts, pinned"))
        parts.append(Component("optimizer states", stepped, "float32 weights and their states, pinned"))
        return parts
    swap = states.zero_settings(plan)["offload_param"]
    size = ranks * int(swap["buffer_size"]) * int(swap["buffer_count"]) * compute_width(plan)
    parts.append(Component("swap buffers", size, "buffer_count x buffer_size of the DeepSpeed JSON, pinned"))
    tile = min(states.trained_share(plan, held), states.ALL_LIVE)
    # Two sets, so that one is read while the other is stepped: weight, two states and gradient in float32.
    parts.append(Component("step buffers", ranks * 2 * 4 * FP32 * tile, "what is stepped at a time, read and written"))
    return parts


def _activations(plan: RunPlan, shape: Shape, held: tuple[Held, ...], packs: PackFigures) -> list[Component]:
    on_host = count_activations(plan, shape, held, packs).on_host * plan.topology.processes_per_node
    return [Component("activations", on_host, "inputs of recomputed layers, pinned")]


def _fullest(plan: RunPlan, held: tuple[Held, ...]) -> list[Component]:
    """The larger of loading and saving."""
    loading, saving = _loading(plan, held), _saving(plan, held)
    return [max(loading, saving, key=lambda part: part.bytes)]


def _loading(plan: RunPlan, held: tuple[Held, ...]) -> Component:
    width = WIDTHS[plan.chosen("model.dtype")]
    if plan.recipe.model.config is not None and states.cuts_weights(plan):
        whole = sum(each.size for each in held if each.kind == "base") * width * plan.topology.processes_per_node
        return Component("loading", whole, "a fresh model, drawn whole by each process before it is sharded")
    units: dict[str, int] = {}
    for each in held:
        units[each.unit] = units.get(each.unit, 0) + each.size * width
    size = max(units.values()) * plan.topology.processes_per_node
    return Component("loading", size, "a unit of each process; pages of the mapped files can be given up")


def _saving(plan: RunPlan, held: tuple[Held, ...]) -> Component:
    """Rank 0 gathers the weights; each rank copies its share of the optimizer's states and keeps the room."""
    weights = _saved_weights(plan, held)
    optimizer = _saved_states(plan, held) // plan.topology.num_nodes
    reason = "weights gathered by the first process, and copies of the optimizer states that are being written"
    return Component("saving", weights + optimizer, reason)


def _saved_weights(plan: RunPlan, held: tuple[Held, ...]) -> int:
    """Trained weights are kept in float32, frozen ones of a whole model as they are held."""
    if plan.recipe.method.trains_base:
        return sum(each.size * (FP32 if each.trained else each.width) for each in held)
    return sum(each.size * FP32 for each in held if each.trained)


def _saved_states(plan: RunPlan, held: tuple[Held, ...]) -> int:
    """States of all ranks, once."""
    ranks = states.shard_ranks(plan)
    return states.optimizer_states(plan, held) * ranks


def _checkpoints(plan: RunPlan, held: tuple[Held, ...]) -> list[Component]:
    section = plan.recipe.checkpoint
    one = _saved_weights(plan, held) + _saved_states(plan, held)
    kept = section.keep_last + section.keep_best
    reason = f"{kept} kept and one being written, each {one:,} bytes: weights and optimizer states"
    return [Component("checkpoints", (kept + 1) * one, reason)]


def _result(plan: RunPlan, held: tuple[Held, ...]) -> list[Component]:
    """In the type that training computed in, written beside the one before it."""
    if plan.recipe.method.trains_base:
        size = sum(each.size for each in held) * compute_width(plan)
    else:
        size = sum(prod(each.shape) for each in held if each.trained) * FP32
    return [Component("result", size, "the model or adapter that comes out")]


def _store(plan: RunPlan, packs: PackFigures) -> list[Component]:
    tokens = plan.data.num_tokens if plan.data else int((packs.num_packs or 0) * packs.tokens_mean)
    return [Component("data store", tokens * TOKEN_BYTES, f"{tokens:,} tokens with their masks")]


def _nvme(plan: RunPlan, held: tuple[Held, ...]) -> list[Component]:
    if plan.topology.engine != "zero3_nvme":
        return []
    ranks = plan.topology.processes_per_node
    weights = ranks * sum(states.own_bytes(plan, each) for each in held)
    stepped = ranks * (states.masters(plan, held) + states.optimizer_states(plan, held))
    return [
        Component("weights", weights, "the ranks' parts"),
        Component("optimizer states", stepped, "float32 weights and their states"),
    ]
