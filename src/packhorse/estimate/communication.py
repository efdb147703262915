"""What ranks send each other, their host and their disk in a step, and how long it takes.

Letters: R ranks of a group, of them k on each of m nodes.

A ring moves (R - 1)/R of what is gathered or scattered past each rank, and twice that of what is all-reduced
(Rajbhandari et al. 2020, arXiv 1910.02054, section 7). Across nodes a group also moves (m - 1)/m of it into each node,
through the network shares of its k GPUs. Latencies are those of NCCL's own model (src/graph/tuning.cc): a step of a
ring costs some microseconds within a node and more between nodes, which ends scaling with thousands of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log2
from typing import Final, Literal

from packhorse.estimate.flops import PassWork
from packhorse.estimate.gpus import GpuProfile
from packhorse.estimate.held import Held, casts_weights, compute_width
from packhorse.model_spec.parameters import Shape
from packhorse.plan.run_plan import RunPlan, Topology

# Share of a link's rate that collectives reach: nccl-tests on DGX H100 360 of 450 GB/s, on DGX A100 235 of 300; over
# PCIe without peer-to-peer both directions go through host memory.
LINK_SHARE: Final = {"switch": 0.8, "mesh": 0.7, "pcie": 0.4}
NETWORK_SHARE: Final = 0.85
PCIE_SHARE: Final = 0.8

# NCCL's ring: (share of the rate, seconds a step within a node, between nodes) of its protocols Simple and LL128.
RING: Final = ((1.0, 3.4e-6, 14.0e-6), (0.92, 1.9e-6, 4.0e-6))
CONTENTION: Final = 1.8
"""How much longer they take where all ranks send at once. Fitted: a 7B under FSDP loses 37 % of its speed from 128 to
2,048 H100 (Fernandez et al. 2024, arXiv 2411.13055)."""
TREE_STEP_SECONDS: Final = 14.0e-6
TREE_SHARE: Final = 0.9
START_SECONDS: Final = 20e-6

# Assumed of hosts and disks, as long as nobody measured them.
HOST_BYTES_PER_SECOND: Final = 150e9
"""Of a node's memory, while an optimizer runs on the host."""
DISK_BYTES_PER_SECOND: Final = 5e9
"""Of a node's NVMe disk, reading or writing."""
GLOO_STEP_SECONDS: Final = 30e-6
"""A step of gloo's ring over the network: the flags that the ranks agree on after each step."""
DDP_BUCKET_BYTES: Final = 25 * 2**20

Phase = Literal["forward", "backward", "step"]


@dataclass(frozen=True)
class Exchange:
    """One kind of transfer.

    Attributes:
        name: What is moved.
        phase: During which part of a step.
        times: How often in a step: once, or in each pass.
        bytes: Each time, into one rank.
        seconds: Each time.
        hidden: Whether it runs beside computation.
        reason: Where it comes from, in a line.
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
    """Ranks that exchange together.

    Attributes:
        size: R.
        per_node: k.
    """

    size: int
    per_node: int

    @property
    def nodes(self) -> int:
        """m."""
        return ceil(self.size / self.per_node)


@dataclass(frozen=True)
class Fabric:
    """The links of a GPU."""

    gpu: GpuProfile
    network_bytes_per_second: float
    """Of one GPU, between nodes, in one direction."""

    def gather(self, total: float, group: Group, calls: int = 1) -> float:
        """Seconds until every rank has all `total` bytes, in so many calls; scattering a sum takes as long."""
        if group.size == 1 or total == 0:
            return 0.0
        return min(self._ring(total, group, calls, share, *steps) for share, *steps in RING) + calls * START_SECONDS

    def all_reduce(self, total: float, group: Group, calls: int = 1) -> float:
        """Seconds until every rank has the sum of `total` bytes: a ring twice, or a tree."""
        if group.size == 1 or total == 0:
            return 0.0
        steps = 2 * (log2(group.nodes) if group.nodes > 1 else 0) + 2 * (group.per_node - 1)
        tree = 2 * self._rate_seconds(total, group) / TREE_SHARE + calls * (steps * TREE_STEP_SECONDS + START_SECONDS)
        return min(2 * self.gather(total, group, calls), tree)

    def all_to_all(self, sent: float, group: Group, calls: int = 1) -> float:
        """Seconds for each rank to send its `sent` bytes in equal parts to all others."""
        if group.size == 1:
            return 0.0
        outside = sent * (group.size - group.per_node) / group.size if group.nodes > 1 else 0.0
        inside = sent * (min(group.per_node, group.size) - 1) / group.size
        return inside / self._link + outside / self._network + calls * START_SECONDS

    def host(self, moved: float) -> float:
        """Seconds to carry bytes between a GPU and its host."""
        return moved / (self.gpu.pcie_gb * 1e9 * PCIE_SHARE)

    @property
    def _link(self) -> float:
        return self.gpu.link_gb * 1e9 * LINK_SHARE[self.gpu.link]

    @property
    def _network(self) -> float:
        return self.network_bytes_per_second * NETWORK_SHARE

    def _ring(self, total: float, group: Group, calls: int, share: float, inside: float, outside: float) -> float:
        between = group.nodes - 1
        latency = CONTENTION * ((group.size - 1 - between) * inside + between * outside)
        return self._rate_seconds(total, group) / share + calls * latency

    def _rate_seconds(self, total: float, group: Group) -> float:
        past = total * (group.size - 1) / group.size / self._link
        if group.nodes == 1:
            return past
        into_node = total * (group.nodes - 1) / group.nodes
        return max(past if group.per_node > 1 else 0.0, into_node / (group.per_node * self._network))


def exchanges(
    plan: RunPlan, shape: Shape, held: tuple[Held, ...], work: PassWork, fabric: Fabric
) -> tuple[Exchange, ...]:
    """Every transfer of a step.

    Args:
        plan: Engine, topology, accumulation.
        shape: Of the model.
        held: Its weights.
        work: Of a pass.
        fabric: Links.
    """
    found = [*_of_engine(plan, shape, held, work, fabric), *_of_sequence(plan, shape, work, fabric)]
    found += [*_of_activations(plan, shape, work, fabric), *_of_muon(plan, held, fabric)]
    ranks = plan.topology.world_size
    if ranks > 1:
        seconds = 2 * (ranks - 1) * GLOO_STEP_SECONDS if plan.topology.num_nodes > 1 else 1e-3
        found.append(Exchange("agreement", "step", 1, 64.0, seconds, False, f"flags of {ranks} ranks, gloo's ring"))
    return tuple(each for each in found if each.seconds > 0)


def shard_group(topology: Topology) -> Group:
    """The ranks that hold one copy of what is sharded."""
    size = topology.shard_group or topology.world_size
    return Group(size, min(size, topology.processes_per_node))


def _of_engine(plan: RunPlan, shape: Shape, held: tuple[Held, ...], work: PassWork, fabric: Fabric) -> list[Exchange]:
    engine, passes = plan.topology.engine, plan.batch.accumulation_steps
    trained = float(sum(each.size for each in held if each.trained))
    group = shard_group(plan.topology)
    width = compute_width(plan)
    if engine == "ddp":
        # Trained weights are float32 there, and so are their gradients.
        calls = max(1, ceil(4 * trained / DDP_BUCKET_BYTES))
        seconds = fabric.all_reduce(4 * trained, group, calls)
        reason = "DDP averages float32 gradients with the last pass, in buckets of 25 MiB"
        return [Exchange("gradients", "backward", 1, _ring_bytes(8 * trained, group), seconds, True, reason)]
    if engine in ("zero1", "zero2"):
        return _of_zero(plan, trained, group, width, fabric)
    if engine == "single":
        return []
    gathers = _gathers(plan, shape, held, work, fabric, group)
    if engine.startswith("zero3"):
        calls = max(1, ceil(trained / _zero(plan)["reduce_bucket_size"]))
        seconds = fabric.gather(width * trained, group, calls)
        reason = "ZeRO-3 scatters the sum of gradients in each pass"
        found = [
            *gathers,
            Exchange("gradients", "backward", passes, _ring_bytes(width * trained, group), seconds, True, reason),
        ]
        return [*found, *_of_offload(plan, held, trained, width, fabric)]
    return [*gathers, *_of_fsdp2(plan, shape, trained, group, fabric)]


def _of_zero(plan: RunPlan, trained: float, group: Group, width: int, fabric: Fabric) -> list[Exchange]:
    stage, zero = plan.topology.engine, _zero(plan)
    times = plan.batch.accumulation_steps if stage == "zero2" else 1
    calls = max(1, ceil(trained / zero["reduce_bucket_size"]))
    seconds = fabric.all_reduce(width * trained, group, calls)
    when = "in each pass" if stage == "zero2" else "with the last pass"
    reason = f"DeepSpeed all-reduces buckets of {zero['reduce_bucket_size']:,} gradients {when} and keeps its part"
    reduced = Exchange("gradients", "backward", times, _ring_bytes(2 * width * trained, group), seconds, True, reason)
    calls = max(1, ceil(trained / zero["allgather_bucket_size"]))
    seconds = fabric.gather(width * trained, group, calls)
    reason = "each rank steps its part of the weights, and all gather them"
    return [reduced, Exchange("weights", "step", 1, _ring_bytes(width * trained, group), seconds, False, reason)]


def _of_fsdp2(plan: RunPlan, shape: Shape, trained: float, group: Group, fabric: Fabric) -> list[Exchange]:
    # Sums are in float32 (train/sharding.py), and travel with the last pass only.
    seconds = fabric.gather(4 * trained, group, shape.layers + 2)
    reason = "FSDP2 scatters the sum of float32 gradients with the last pass"
    found = [Exchange("gradients", "backward", 1, _ring_bytes(4 * trained, group), seconds, True, reason)]
    copies = plan.topology.world_size // group.size
    if copies > 1:
        part = 4 * trained / group.size
        across = Group(copies, max(1, plan.topology.processes_per_node // group.size))
        seconds = fabric.all_reduce(part, across, shape.layers + 2)
        reason = f"{copies} copies of the weights average their shards of gradients once a step"
        found.append(
            Exchange("gradients between copies", "backward", 1, _ring_bytes(2 * part, across), seconds, True, reason)
        )
    return found


def _gathers(
    plan: RunPlan, shape: Shape, held: tuple[Held, ...], work: PassWork, fabric: Fabric, group: Group
) -> list[Exchange]:
    """Weights that are put together to compute with, forward and once more backward."""
    passes = plan.batch.accumulation_steps
    sizes = {"layers": 0.0, "rest": 0.0}
    for each in held:
        width = 2 if casts_weights(plan) and each.storage == "plain" else each.width
        whole = float(each.size * width if each.storage == "plain" else each.data_bytes)
        sizes["layers" if each.unit.startswith("layer") else "rest"] += whole
    calls = shape.layers + 2
    if plan.topology.engine.startswith("zero3"):
        # What is smaller than the bucket travels together with others, what is larger by itself.
        bucket = _zero(plan)["stage3_prefetch_bucket_size"]
        calls = max(calls, ceil(sum(min(1.0, each.size / bucket) for each in held)))
    forward = sizes["layers"] + sizes["rest"]
    # Layers that no gradient flows through are not put together again, nor is what the forward pass ended with.
    backward = sizes["layers"] * work.layers_backward / shape.layers
    name = "ZeRO-3" if plan.topology.engine.startswith("zero3") else "FSDP2"
    reason = f"{name} gathers each layer's weights from {group.size} ranks in each pass"
    phases: tuple[tuple[Phase, float], ...] = (("forward", forward), ("backward", backward))
    return [
        Exchange("weights", phase, passes, _ring_bytes(total, group), fabric.gather(total, group, calls), True, reason)
        for phase, total in phases
    ]


def _of_offload(plan: RunPlan, held: tuple[Held, ...], trained: float, width: int, fabric: Fabric) -> list[Exchange]:
    engine, ranks = plan.topology.engine, plan.topology.world_size
    if engine == "zero3":
        return []
    passes, per_node = plan.batch.accumulation_steps, plan.topology.processes_per_node
    part = sum(each.data_bytes if each.storage != "plain" else each.size * width for each in held) / ranks
    on_disk = engine == "zero3_nvme"
    from_disk = part * per_node / DISK_BYTES_PER_SECOND if on_disk else 0.0
    fetched = max(fabric.host(part), from_disk)
    where = "the disk" if on_disk else "host memory"
    phases: tuple[Phase, ...] = ("forward", "backward")
    reason = f"each rank's part comes from {where}"
    found = [Exchange(f"weights from {where}", phase, passes, part, fetched, True, reason) for phase in phases]
    share = trained / ranks
    moved = fabric.host(share * width)
    found.append(
        Exchange("gradients to the host", "backward", passes, share * width, moved, True, "to be stepped there")
    )
    # AdamW reads a weight, its gradient and two means in float32 and writes all but the gradient; 16 bits on top.
    stepped = 30.0 * share * per_node / HOST_BYTES_PER_SECOND
    reason = f"torch's AdamW on the host, at {HOST_BYTES_PER_SECOND / 1e9:g} GB/s a node (assumed)"
    found.append(Exchange("optimizer on the host", "step", 1, 30.0 * share, stepped, False, reason))
    if on_disk:
        # Master weights and two means, in float32, both ways.
        swapped = 24.0 * share
        reason = f"optimizer states from and to the disk, at {DISK_BYTES_PER_SECOND / 1e9:g} GB/s a node (assumed)"
        seconds = swapped * per_node / DISK_BYTES_PER_SECOND
        found.append(Exchange("optimizer states on the disk", "step", 1, swapped, seconds, False, reason))
    return found


def _of_sequence(plan: RunPlan, shape: Shape, work: PassWork, fabric: Fabric) -> list[Exchange]:
    """Ulysses (Jacobs et al. 2023, arXiv 2309.14509): queries, keys, values and outputs change hands in each layer."""
    size = plan.topology.sequence
    if size == 1:
        return []
    group = Group(size, min(size, plan.topology.processes_per_node))
    # Fewer key/value heads than ranks are repeated, up to the smallest number that these divide.
    repeated = shape.key_value_heads if shape.key_value_heads % size == 0 else _least_multiple(shape, size)
    width = compute_width(plan)
    sent = work.tokens * 2 * (shape.heads + repeated) * shape.head_width * width
    passes = plan.batch.accumulation_steps
    one = fabric.all_to_all(sent, group, calls=4)
    reason = f"queries, keys, values and outputs change between {size} ranks in each layer"
    back = work.layers_backward + work.layers_recomputed
    layers: tuple[tuple[Phase, int], ...] = (("forward", shape.layers), ("backward", back))
    return [Exchange("sequence", phase, passes, count * sent, count * one, False, reason) for phase, count in layers]


def _least_multiple(shape: Shape, size: int) -> int:
    steps = range(shape.key_value_heads, shape.heads + 1, shape.key_value_heads)
    return next(heads for heads in steps if heads % size == 0)


def _of_activations(plan: RunPlan, shape: Shape, work: PassWork, fabric: Fabric) -> list[Exchange]:
    """transformers copies on the stream that computes: nothing hides it."""
    if not plan.recipe.parallel.offload_activations:
        return []
    moved = work.layers_recomputed * work.tokens * shape.hidden * compute_width(plan)
    passes, seconds = plan.batch.accumulation_steps, fabric.host(moved)
    reason = "inputs of recomputed layers go to host memory and back"
    phases: tuple[Phase, ...] = ("forward", "backward")
    return [Exchange("activations", phase, passes, moved, seconds, False, reason) for phase in phases]


def _of_muon(plan: RunPlan, held: tuple[Held, ...], fabric: Fabric) -> list[Exchange]:
    """Sharded matrices are gathered for each product of an iteration: twice themselves, once the square of a side."""
    if plan.recipe.optimizer.name != "muon" or plan.topology.engine not in ("fsdp2", "hsdp"):
        return []
    sides = [each.shape for each in held if each.trained and len(each.shape) == 2 and each.unit.startswith("layer")]
    total = sum(5.0 * 2 * (2 * rows * columns + min(rows, columns) ** 2) for rows, columns in sides)
    group = shard_group(plan.topology)
    seconds = fabric.gather(total, group, 15 * len(sides))
    reason = "Muon's five iterations gather each matrix, in bfloat16"
    return [Exchange("matrices of Muon", "step", 1, _ring_bytes(total, group), seconds, False, reason)]


def _ring_bytes(total: float, group: Group) -> float:
    return total * (group.size - 1) / group.size


def _zero(plan: RunPlan) -> dict[str, int]:
    assert plan.deepspeed is not None
    settings: dict[str, int] = plan.deepspeed["zero_optimization"]
    return settings
