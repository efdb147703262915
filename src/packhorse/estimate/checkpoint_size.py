"""Size of a checkpoint, tensor by tensor: on disk, and of the copies on the host while it is written.

`train/checkpoint/` writes what is counted here: the first rank writes the weights, and each optimizer state is written
by the rank that has least to write so far. An asynchronous checkpoint is written from copies, which a rank keeps from
save to save.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil, prod
from typing import Final

from packhorse.estimate import training_state
from packhorse.estimate.training_state import FP32
from packhorse.estimate.weights import WeightTensor, list_weights
from packhorse.model_spec.parameters import Shape
from packhorse.plan.run_plan import RunPlan
from packhorse.run_folder.checkpoints.pinned_slabs import slabs_bytes

CODE_BYTES: Final = 4 * 256
"""The values that 8-bit states encode, which bitsandbytes saves with each tensor (arXiv 2110.02861, section 2)."""
FILE_BYTES: Final = 4 * 2**30
"""Largest file of states that `train/checkpoint/` writes."""


@dataclass(frozen=True)
class SavedTensor:
    """A tensor of a checkpoint.

    Attributes:
        shape: Whole shape, whatever the sharding.
        width: Bytes per element.
    """

    shape: tuple[int, ...]
    width: int

    @cached_property
    def bytes(self) -> int:
        """Bytes of the whole tensor."""
        return prod(self.shape) * self.width

    def rows_bytes(self, ranks: int) -> int:
        """Return the bytes of one rank's rows under FSDP2, padded to the first rank's."""
        return -(-self.shape[0] // ranks) * (self.bytes // self.shape[0])


@dataclass(frozen=True)
class CheckpointSpace:
    """Disk space for the checkpoints of a run.

    Attributes:
        each_bytes: Size of one checkpoint, without small files.
        count: Largest number of checkpoints at once, with the one that is being written.
    """

    each_bytes: int
    count: int

    @property
    def total_bytes(self) -> int:
        """Size of all checkpoints."""
        return self.each_bytes * self.count


def checkpoint_space(plan: RunPlan, shape: Shape) -> CheckpointSpace | None:
    """Count the disk space of a run's checkpoints.

    Returns:
        None where peft alone decides what the method trains.
    """
    weights = list_weights(plan, shape)
    return None if weights is None else space_of(plan, weights)


def space_of(plan: RunPlan, weights: Sequence[WeightTensor]) -> CheckpointSpace:
    """Count the disk space of the checkpoints of these weights."""
    each = _bytes(saved_weights(plan, weights)) + _bytes(saved_states(plan, weights))
    return CheckpointSpace(each, _most_at_once(plan))


def _most_at_once(plan: RunPlan) -> int:
    section = plan.recipe.checkpoint
    kept = section.keep_last + section.keep_best
    if section.every_steps is None:
        kept = 1  # the one at the end, or at a stop
    elif plan.num_steps is not None:
        kept = min(kept, ceil(plan.num_steps / section.every_steps))
    return kept + 1


def saved_weights(plan: RunPlan, weights: Sequence[WeightTensor]) -> list[SavedTensor]:
    """Return the saved weights: trained ones in float32, and the frozen ones of a whole model in their own format."""
    whole = plan.recipe.method.trains_base
    saved = [weight for weight in weights if whole or weight.trained]
    return [SavedTensor(weight.shape, FP32 if weight.trained else weight.width) for weight in saved]


def saved_states(plan: RunPlan, weights: Sequence[WeightTensor]) -> list[SavedTensor]:
    """Return the optimizer states of all ranks, without tensors of one element."""
    name = plan.recipe.optimizer.name
    if plan.topology.engine == "zero3_nvme":
        return []  # DeepSpeed does not read them back from its files
    trained = [weight for weight in weights if weight.trained]
    if not name.endswith("8bit"):
        return [state for weight in trained for state in _states_of(name, weight)]
    moments = 1 if name.startswith("lion") else 2
    shapes: Iterable[tuple[int, ...]] = (weight.shape for weight in trained)
    if training_state.is_deepspeed(plan):
        share = training_state.trained_share(plan, weights)
        shapes = ((share,) for _ in range(training_state.shard_ranks(plan)))
    return [state for shape in shapes for _ in range(moments) for state in _eight_bit_state(shape)]


def _states_of(name: str, weight: WeightTensor) -> Iterator[SavedTensor]:
    shape = weight.shape
    if name == "adafactor" and len(shape) > 1:
        yield SavedTensor((*shape[:-1], 1), FP32)
        yield SavedTensor((*shape[:-2], 1, shape[-1]), FP32)
        return
    two = name in ("adamw", "paged_adamw") or (name == "muon" and not training_state.uses_muon(weight))
    for _ in range(2 if two else 1):
        yield SavedTensor(shape, FP32)


def _eight_bit_state(shape: tuple[int, ...]) -> Iterator[SavedTensor]:
    """Yield the elements, the scales of their blocks, and the code."""
    size = prod(shape)
    if size < training_state.EIGHT_BIT_FROM:
        yield SavedTensor(shape, FP32)
        return
    yield SavedTensor(shape, 1)
    yield SavedTensor((-(-size // training_state.EIGHT_BIT_BLOCK),), FP32)
    yield SavedTensor((CODE_BYTES // FP32,), FP32)


def copies_bytes(plan: RunPlan, weights: Sequence[WeightTensor]) -> int:
    """Return the host memory of the first node for copies of what is saved, at its fullest moment.

    The first rank writes the trained model while the copies for checkpoints still exist: its weights once more in
    float32 and, for a whole model, in the compute format.
    """
    saved = saved_weights(plan, weights)
    width = FP32 if plan.recipe.precision == "fp32" else 2
    cast = (
        sum(prod(tensor.shape) for tensor in saved) * width if plan.recipe.method.trains_base and width != FP32 else 0
    )
    # FSDP2's shards are gathered while they are written; without asynchronous copies, everything is.
    gathers = not plan.recipe.checkpoint.asynchronous or plan.topology.engine in ("fsdp2", "hsdp")
    owned = _owned(plan, weights)
    files = sum(_in_file(owned[rank]) for rank in range(plan.topology.processes_per_node)) if gathers else 0
    return _buffers_of_node(plan, saved, owned) + _bytes(saved) + max(cast, files)


def buffers_bytes(plan: RunPlan, weights: Sequence[WeightTensor]) -> int:
    """Return the copies that the first node's ranks keep from save to save (`HostBuffers` in `train/checkpoint/`)."""
    return _buffers_of_node(plan, saved_weights(plan, weights), _owned(plan, weights))


def _buffers_of_node(plan: RunPlan, saved: Sequence[SavedTensor], owned: Sequence[Sequence[SavedTensor]]) -> int:
    if not plan.recipe.checkpoint.asynchronous:
        return 0
    node = range(plan.topology.processes_per_node)
    if plan.topology.engine in ("fsdp2", "hsdp"):
        return sum(_shard_buffers(plan, saved, owned, rank) for rank in node)
    first = [tensor.bytes for tensor in saved]
    return sum(
        _buffers(plan, [*(first if rank == 0 else ()), *(tensor.bytes for tensor in owned[rank])]) for rank in node
    )


def _shard_buffers(
    plan: RunPlan, saved: Sequence[SavedTensor], owned: Sequence[Sequence[SavedTensor]], rank: int
) -> int:
    """Return one rank's rows of all that is written by the ranks of its shard group."""
    ranks = training_state.shard_ranks(plan)
    first = rank // ranks * ranks
    group = [tensor for owner in owned[first : first + ranks] for tensor in owner]
    return _buffers(plan, [tensor.rows_bytes(ranks) for tensor in (*(saved if first == 0 else ()), *group)])


def _owned(plan: RunPlan, weights: Sequence[WeightTensor]) -> list[list[SavedTensor]]:
    """Return the states that each rank writes; the first rank already writes all weights."""
    first = _bytes(saved_weights(plan, weights))
    loads = [(first if rank == 0 else 0, rank) for rank in range(plan.topology.world_size)]
    heapq.heapify(loads)
    owned: list[list[SavedTensor]] = [[] for _ in loads]
    for state in saved_states(plan, weights):
        load, rank = loads[0]
        owned[rank].append(state)
        heapq.heapreplace(loads, (load + state.bytes, rank))
    return owned


def _in_file(owned: Sequence[SavedTensor]) -> int:
    """Return the whole states that one rank holds at a time: those of one file, and the next one."""
    return min(_bytes(owned), FILE_BYTES + max((tensor.bytes for tensor in owned), default=0))


def _buffers(plan: RunPlan, sizes: Sequence[int]) -> int:
    """Return the memory of one rank's copies; without pinning, only pages that are written take memory."""
    return slabs_bytes(sizes) if plan.topology.device == "cuda" else sum(sizes)


def _bytes(tensors: Iterable[SavedTensor]) -> int:
    return sum(tensor.bytes for tensor in tensors)
