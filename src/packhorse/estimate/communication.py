"""Transfers of a step between ranks, to the host and to disk, and the time that they take.

Letters: R ranks of a group, k of them on each of m nodes.

A ring moves (R - 1)/R of what is gathered or scattered past each rank, and twice that of what is all-reduced
(Rajbhandari et al. 2020, arXiv 1910.02054, section 7). Between nodes a group also moves (m - 1)/m of it into each node,
through the network shares of its k GPUs. Latencies are those of NCCL's own model (src/graph/tuning.cc): a step of a
ring costs some microseconds within a node and more between nodes, which ends scaling at thousands of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log2
from typing import Final, Literal

from packhorse.estimate.flops import PassWork
from packhorse.estimate.gpus import GpuProfile
from packhorse.estimate.training_state import uses_muon, zero_settings
from packhorse.estimate.weights import WeightTensor, casts_weights, compute_width
from packhorse.model_spec.parameters import Shape
from packhorse.plan.run_plan import RunPlan, Topology

# Share of a link's rate that collectives reach: nccl-tests on DGX H100 360 of 450 GB/s, on DGX A100 235 of 300; over
# PCIe without peer-to-peer both directions go through host memory.
LINK_SHARE: Final = {"switch": 0.8, "mesh": 0.7, "pcie": 0.4}
NETWORK_SHARE: Final = 0.85
PCIE_SHARE: Final = 0.8

# NCCL's ring with its protocol LL128, and its tree. Seconds are those of one step.
RING_SHARE: Final = 0.92
RING_NODE_SECONDS: Final = 1.9e-6
RING_NETWORK_SECONDS: Final = 4.0e-6
CONTENTION: Final = 1.8
"""Factor on latency where all ranks send at once. Fitted: a 7B model under FSDP loses 37 % of its speed from 128 to
2,048 H100 (Fernandez et al. 2024, arXiv 2411.13055)."""
TREE_SHARE: Final = 0.9
TREE_SECONDS: Final = 14.0e-6
START_SECONDS: Final = 20e-6

# Assumed for hosts and disks, which nobody has measured yet.
HOST_BYTES_PER_SECOND: Final = 150e9
"""Bandwidth of a node's memory while an optimizer runs on the host."""
DISK_BYTES_PER_SECOND: Final = 5e9
"""Bandwidth of a node's NVMe disk, reading or writing."""
GLOO_STEP_SECONDS: Final = 30e-6
"""One step of gloo's ring over the network: the flags that the ranks agree on after each training step."""
DDP_BUCKET_BYTES: Final = 25 * 2**20

Phase = Literal["forward", "backward", "step"]
PASS: Final[tuple[Phase, ...]] = ("forward", "backward")


@dataclass(frozen=True)
class Transfer:
    """One kind of transfer.

    Attributes:
        name: What is moved.
        phase: Part of a step in which it is moved.
        times: Number of transfers in a step: 1, or one per pass.
        bytes: Bytes per transfer into one rank.
        seconds: Seconds per transfer.
        hidden: Whether it overlaps with computation.
        reason: Where it comes from, in one line.
    """

    name: str
    phase: Phase
    times: int
    bytes: float
    seconds: float
    hidden: bool
    reason: str


@dataclass(frozen=True)
class Group:
    """Ranks that communicate together.

    Attributes:
        size: R.
        per_node: k.
    """

    size: int
    per_node: int

    @property
    def nodes(self) -> int:
        """Number of nodes, m."""
        return ceil(self.size / self.per_node)

    def ring_bytes(self, total: float) -> float:
        """Return the bytes that a ring moves past each rank to gather `total` bytes."""
        return total * (self.size - 1) / self.size


@dataclass(frozen=True)
class Links:
    """Links of one GPU.

    Attributes:
        gpu: Profile of the GPU.
        network_bytes_per_second: Rate of one GPU between nodes, in one direction.
    """

    gpu: GpuProfile
    network_bytes_per_second: float

    def gather(self, total: float, group: Group, calls: int = 1) -> float:
        """Return the seconds of an all-gather of `total` bytes in `calls` calls; a reduce-scatter takes as long."""
        if group.size == 1 or total == 0:
            return 0.0
        between = group.nodes - 1
        latency = (group.size - 1 - between) * RING_NODE_SECONDS + between * RING_NETWORK_SECONDS
        return self._rate_seconds(total, group) / RING_SHARE + calls * (CONTENTION * latency + START_SECONDS)

    def all_reduce(self, total: float, group: Group, calls: int = 1) -> float:
        """Return the seconds until every rank has the sum of `total` bytes: two rings, or a tree."""
        if group.size == 1 or total == 0:
            return 0.0
        steps = 2 * (log2(group.nodes) if group.nodes > 1 else 0) + 2 * (group.per_node - 1)
        tree = 2 * self._rate_seconds(total, group) / TREE_SHARE + calls * (steps * TREE_SECONDS + START_SECONDS)
        return min(2 * self.gather(total, group, calls), tree)

    def all_to_all(self, sent: float, group: Group, calls: int = 1) -> float:
        """Return the seconds for each rank to send `sent` bytes in equal parts to all others."""
        if group.size == 1:
            return 0.0
        outside = sent * (group.size - group.per_node) / group.size if group.nodes > 1 else 0.0
        inside = sent * (min(group.per_node, group.size) - 1) / group.size
        return inside / self._link + outside / self._network + calls * START_SECONDS

    def host(self, moved: float) -> float:
        """Return the seconds to move bytes between a GPU and its host."""
        return moved / (self.gpu.pcie_gb * 1e9 * PCIE_SHARE)

    @property
    def _link(self) -> float:
        return self.gpu.link_gb * 1e9 * LINK_SHARE[self.gpu.link]

    @property
    def _network(self) -> float:
        return self.network_bytes_per_second * NETWORK_SHARE

    def _rate_seconds(self, total: float, group: Group) -> float:
        past = group.ring_bytes(total) / self._link
        if group.nodes == 1:
            return past
        into_node = total * (group.nodes - 1) / group.nodes
        return max(past if group.per_node > 1 else 0.0, into_node / (group.per_node * self._network))


def transfers(
    plan: RunPlan, shape: Shape, weights: tuple[WeightTensor, ...], work: PassWork, links: Links
) -> tuple[Transfer, ...]:
    """List every transfer of a step."""
    found = [
        *_of_engine(plan, shape, weights, work, links),
        *_of_sequence(plan, shape, work, links),
        *_of_activations(plan, shape, work, links),
        *_of_muon(plan, weights, links),
    ]
    ranks = plan.topology.world_size
    if ranks > 1:
        seconds = 2 * (ranks - 1) * GLOO_STEP_SECONDS if plan.topology.num_nodes > 1 else 1e-3
        found.append(Transfer("agreement", "step", 1, 64.0, seconds, False, f"flags of {ranks} ranks, gloo's ring"))
    return tuple(each for each in found if each.seconds > 0)


def shard_group(topology: Topology) -> Group:
    """Return the ranks that hold one copy of what is sharded."""
    size = topology.shard_group or topology.world_size
    return Group(size, min(size, topology.processes_per_node))


def _of_engine(
    plan: RunPlan, shape: Shape, weights: tuple[WeightTensor, ...], work: PassWork, links: Links
) -> list[Transfer]:
    engine = plan.topology.engine
    if engine == "single":
        return []
    trained = float(sum(weight.size for weight in weights if weight.trained))
    group, width = shard_group(plan.topology), compute_width(plan)
    if engine == "ddp":
        # Trained weights are float32 under DDP, and so are their gradients.
        calls = max(1, ceil(4 * trained / DDP_BUCKET_BYTES))
        reason = "DDP averages float32 gradients in the last pass, in buckets of 25 MiB"
        seconds = links.all_reduce(4 * trained, group, calls)
        return [Transfer("gradients", "backward", 1, group.ring_bytes(8 * trained), seconds, True, reason)]
    if engine in ("zero1", "zero2"):
        return _of_zero(plan, trained, group, width, links)
    gathers = _gathers(plan, shape, weights, work, links, group)
    if not engine.startswith("zero3"):
        return [*gathers, *_of_fsdp2(plan, shape, trained, group, links)]
    calls = max(1, ceil(trained / zero_settings(plan)["reduce_bucket_size"]))
    seconds, passes = links.gather(width * trained, group, calls), plan.batch.accumulation_steps
    reason = "ZeRO-3 reduce-scatters gradients in each pass"
    moved = group.ring_bytes(width * trained)
    gradients = Transfer("gradients", "backward", passes, moved, seconds, True, reason)
    return [*gathers, gradients, *_of_offload(plan, weights, trained, width, links)]


def _of_zero(plan: RunPlan, trained: float, group: Group, width: int, links: Links) -> list[Transfer]:
    stage, zero = plan.topology.engine, zero_settings(plan)
    times = plan.batch.accumulation_steps if stage == "zero2" else 1
    calls = max(1, ceil(trained / zero["reduce_bucket_size"]))
    seconds = links.all_reduce(width * trained, group, calls)
    when = "in each pass" if stage == "zero2" else "in the last pass"
    reason = f"DeepSpeed all-reduces buckets of {zero['reduce_bucket_size']:,} gradients {when} and keeps its part"
    moved = group.ring_bytes(width * trained)
    reduced = Transfer("gradients", "backward", times, 2 * moved, seconds, True, reason)
    calls = max(1, ceil(trained / zero["allgather_bucket_size"]))
    seconds = links.gather(width * trained, group, calls)
    reason = "each rank updates its part of the weights, and all gather them"
    return [reduced, Transfer("weights", "step", 1, moved, seconds, False, reason)]


def _of_fsdp2(plan: RunPlan, shape: Shape, trained: float, group: Group, links: Links) -> list[Transfer]:
    # Sums are in float32 (train/engine/sharding.py), and are sent in the last pass only.
    calls = shape.layers + 2
    seconds = links.gather(4 * trained, group, calls)
    reason = "FSDP2 reduce-scatters float32 gradients in the last pass"
    found = [Transfer("gradients", "backward", 1, group.ring_bytes(4 * trained), seconds, True, reason)]
    copies = plan.topology.world_size // group.size
    if copies > 1:
        part = 4 * trained / group.size
        across = Group(copies, max(1, plan.topology.processes_per_node // group.size))
        seconds, moved = links.all_reduce(part, across, calls), across.ring_bytes(2 * part)
        reason = f"{copies} copies of the weights average their shards of gradients once per step"
        found.append(Transfer("gradients between copies", "backward", 1, moved, seconds, True, reason))
    return found


def _gathers(
    plan: RunPlan, shape: Shape, weights: tuple[WeightTensor, ...], work: PassWork, links: Links, group: Group
) -> list[Transfer]:
    """Return the gathers of sharded weights for computation, in the forward and again in the backward pass."""
    layers = rest = 0.0
    for weight in weights:
        width = 2 if casts_weights(plan) and weight.storage == "plain" else weight.width
        size = float(weight.size * width if weight.storage == "plain" else weight.data_bytes)
        if weight.unit.startswith("layer"):
            layers += size
        else:
            rest += size
    calls, name = shape.layers + 2, "FSDP2"
    if plan.topology.engine.startswith("zero3"):
        # Weights smaller than the bucket are sent together, larger ones alone.
        bucket = zero_settings(plan)["stage3_prefetch_bucket_size"]
        calls, name = max(calls, ceil(sum(min(1.0, weight.size / bucket) for weight in weights))), "ZeRO-3"
    # Layers that no gradient passes through are not gathered again, nor is the last unit of the forward pass.
    backward = layers * work.layers_backward / shape.layers
    reason = f"{name} gathers each layer's weights from {group.size} ranks in each pass"
    phases: tuple[tuple[Phase, float], ...] = (("forward", layers + rest), ("backward", backward))
    passes = plan.batch.accumulation_steps
    return [
        Transfer("weights", phase, passes, group.ring_bytes(total), links.gather(total, group, calls), True, reason)
        for phase, total in phases
    ]


def _of_offload(
    plan: RunPlan, weights: tuple[WeightTensor, ...], trained: float, width: int, links: Links
) -> list[Transfer]:
    engine, ranks = plan.topology.engine, plan.topology.world_size
    if engine == "zero3":
        return []
    passes, per_node = plan.batch.accumulation_steps, plan.topology.processes_per_node
    part = sum(each.data_bytes if each.storage != "plain" else each.size * width for each in weights) / ranks
    on_disk = engine == "zero3_nvme"
    fetched = max(links.host(part), part * per_node / DISK_BYTES_PER_SECOND if on_disk else 0.0)
    where = "the disk" if on_disk else "host memory"
    reason = f"each rank's part comes from {where}"
    found = [Transfer(f"weights from {where}", phase, passes, part, fetched, True, reason) for phase in PASS]
    share = trained / ranks
    sent, reason = share * width, "for the update on the host"
    found.append(Transfer("gradients to the host", "backward", passes, sent, links.host(sent), True, reason))
    # AdamW reads a weight, its gradient and two means in float32 and writes all but the gradient; and 16-bit weights.
    updated = 30.0 * share
    reason = f"torch's AdamW on the host, at {HOST_BYTES_PER_SECOND / 1e9:g} GB/s per node (assumed)"
    seconds = updated * per_node / HOST_BYTES_PER_SECOND
    found.append(Transfer("optimizer on the host", "step", 1, updated, seconds, False, reason))
    if on_disk:
        # Master weights and two means, in float32, in both directions.
        swapped = 24.0 * share
        reason = f"optimizer states from and to the disk, at {DISK_BYTES_PER_SECOND / 1e9:g} GB/s per node (assumed)"
        seconds = swapped * per_node / DISK_BYTES_PER_SECOND
        found.append(Transfer("optimizer states on the disk", "step", 1, swapped, seconds, False, reason))
    return found


def _of_sequence(plan: RunPlan, shape: Shape, work: PassWork, links: Links) -> list[Transfer]:
    """Return Ulysses' exchanges of queries, keys, values and outputs (Jacobs et al. 2023, arXiv 2309.14509)."""
    size = plan.topology.sequence
    if size == 1:
        return []
    group = Group(size, min(size, plan.topology.processes_per_node))
    # Where the ranks do not divide the key/value heads, these are repeated until they do.
    multiples = range(shape.key_value_heads, shape.heads + 1, shape.key_value_heads)
    repeated = next(heads for heads in multiples if heads % size == 0)
    sent = work.tokens * 2 * (shape.heads + repeated) * shape.head_width * compute_width(plan)
    passes, seconds = plan.batch.accumulation_steps, links.all_to_all(sent, group, calls=4)
    reason = f"{size} ranks exchange queries, keys, values and outputs in each layer"
    back = work.layers_backward + work.layers_recomputed
    layers: tuple[tuple[Phase, int], ...] = (("forward", shape.layers), ("backward", back))
    return [
        Transfer("sequence", phase, passes, count * sent, count * seconds, False, reason) for phase, count in layers
    ]


def _of_activations(plan: RunPlan, shape: Shape, work: PassWork, links: Links) -> list[Transfer]:
    """Return the copies of layer inputs, which a side stream makes while the layers compute."""
    if not plan.recipe.parallel.offload_activations:
        return []
    moved = work.layers_recomputed * work.tokens * shape.hidden * compute_width(plan)
    passes, seconds = plan.batch.accumulation_steps, links.host(moved)
    reason = "inputs of recomputed layers go to host memory and back"
    return [Transfer("activations", phase, passes, moved, seconds, True, reason) for phase in PASS]


def _of_muon(plan: RunPlan, weights: tuple[WeightTensor, ...], links: Links) -> list[Transfer]:
    """Return the gathers of sharded matrices for each product of an iteration: the matrix twice, a square once."""
    if plan.recipe.optimizer.name != "muon" or plan.topology.engine not in ("fsdp2", "hsdp"):
        return []
    shapes = [each.shape for each in weights if each.trained and uses_muon(each)]
    total = sum(5.0 * 2 * (2 * rows * columns + min(rows, columns) ** 2) for rows, columns in shapes)
    group = shard_group(plan.topology)
    seconds = links.gather(total, group, 15 * len(shapes))
    reason = "Muon's five iterations gather each matrix, in bfloat16"
    return [Transfer("matrices of Muon", "step", 1, group.ring_bytes(total), seconds, False, reason)]
