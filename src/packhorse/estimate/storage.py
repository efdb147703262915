"""Host memory of a node and room on disk: what loading, offload, saving and checkpoints take."""

from __future__ import annotations

import math
from dataclasses import dataclass
from math import prod
from typing import Final

from packhorse.estimate import states
from packhorse.estimate.activations import count_activations
from packhorse.estimate.component import Component, total_bytes
from packhorse.estimate.held import WIDTHS, Held, compute_width, held_weights
from packhorse.estimate.packs import PackFigures
from packhorse.estimate.saved import copies_bytes, room_of
from packhorse.model_spec.parameters import Shape
from packhorse.plan.run_plan import RunPlan
from packhorse.run_folder.checkpoints.pinned_slabs import pinned_bytes

FP32: Final = 4
# Python with torch, transformers, peft and their CUDA libraries: 1.6 to 2.4 GB resident on Linux; an assumption.
PROCESS_BYTES: Final = 2_000_000_000
TOKEN_BYTES: Final = 5
"""A token on disk: its id in 4 bytes at most, and its mask."""
BATCH_BYTES: Final = 4 * 8
"""A token of a batch: id, position, and where it is trained on its place and its target, in 64 bits each."""
BATCHES: Final = 3
"""Steps that `data/packs/loader.py` holds: the one that trains and the next two."""
PINNING: Final = "torch rounds pinned memory up to powers of two; parts that DeepSpeed joins stay beside the whole"


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
    host = (
        *_processes(plan),
        *_offloaded(plan, held),
        *_activations(plan, shape, held, packs),
        *_batches(plan, packs),
        *_fullest(plan, held),
    )
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
        again = ranks * FP32 * states.trained_share(plan, held)
        parts.append(Component("weights", weights, "the ranks' parts, pinned"))
        parts.append(Component("optimizer states", stepped, "float32 weights and their states"))
        parts.append(Component("step gradients", again, "the ranks' parts once more in float32, for the step, pinned"))
        parts.append(Component("pinning", ranks * _pinning(plan, held), PINNING))
        return parts
    swap = states.zero_settings(plan)["offload_param"]
    size = ranks * int(swap["buffer_size"]) * int(swap["buffer_count"]) * compute_width(plan)
    parts.append(Component("swap buffers", size, "buffer_count x buffer_size of the DeepSpeed JSON, pinned"))
    tile = min(states.trained_share(plan, held), states.ALL_LIVE)
    # Two sets, so that one is read while the other is stepped: weight, two states and gradient in float32.
    parts.append(Component("step buffers", ranks * 2 * 4 * FP32 * tile, "what is stepped at a time, read and written"))
    return parts


def _pinning(plan: RunPlan, held: tuple[Held, ...]) -> int:
    """What pinned memory takes beside the numbers in it, on a rank.

    DeepSpeed pins each weight's part by itself (`partition_parameters.py`), then all that are trained as one piece
    (`stage3.py`); torch keeps the memory of the former. Read in DeepSpeed 0.19 and torch 2.13, not measured.
    """
    if plan.topology.device == "cpu":
        return 0
    own = [(each.trained, states.own_bytes(plan, each)) for each in states.by_persistence(plan, held)[1]]
    flat = sum(size for trained, size in own if trained)
    share = states.trained_share(plan, held)
    tiles, rest = divmod(share, states.ALL_LIVE)
    pinned = [size for _, size in own] + [flat, states.kept_gradients(plan, held)]
    pinned += [FP32 * states.ALL_LIVE] * tiles + [FP32 * rest]
    exact = sum(pinned) - flat
    return sum(pinned_bytes(size) for size in pinned) - exact


def _batches(plan: RunPlan, packs: PackFigures) -> list[Component]:
    """Packs of a group of sequence ranks are laid out by each of them."""
    tokens = math.ceil(plan.batch.packs_per_step / plan.topology.data_ranks * packs.tokens_mean)
    size = plan.topology.processes_per_node * BATCHES * BATCH_BYTES * tokens
    return [Component("batches", size, "the step that trains and the next two, of each process")]


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
    beside = plan.recipe.checkpoint.asynchronous
    reason = "copies that checkpoints are written from, kept from save to save" if beside else "what is being written"
    return Component("saving", copies_bytes(plan, held), f"{reason}, and the weights that come out at the end")


def _checkpoints(plan: RunPlan, held: tuple[Held, ...]) -> list[Component]:
    room = room_of(plan, held)
    reason = f"{room.count} at once at most, each {room.each_bytes:,} bytes: weights and optimizer states"
    return [Component("checkpoints", room.total_bytes, reason)]


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
