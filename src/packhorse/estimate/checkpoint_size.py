"""Size of a checkpoint, tensor by tensor: on disk, and of the copies on the host while it is written.

`train/checkpoint/` writes what is counted here: each file of a model's weights, and each optimizer state, is written by
the rank that has least to write so far, and an adapter by the first rank. An asynchronous checkpoint is written from
copies, which a rank keeps from save to save.
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
"""Largest file that `train/checkpoint/` writes, except for a larger tensor or unit."""


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


File = list[SavedTensor]


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

    A rank writes one file at a time. At the end the trained model or adapter is written while the copies for
    checkpoints still exist.
    """
    files = _files_of_ranks(plan, weights)[: plan.topology.processes_per_node]
    # FSDP2's shards are gathered while they are written; without asynchronous copies, everything is.
    gathers = not plan.recipe.checkpoint.asynchronous or plan.topology.engine in ("fsdp2", "hsdp")
    written = sum(max(map(_bytes, own), default=0) for own in files) if gathers else 0
    if plan.recipe.method.trains_base:
        width = FP32 if plan.recipe.precision == "fp32" else 2
        dealt = _deal(_model_files(plan, weights, width), [(0, rank) for rank in range(plan.topology.world_size)])
        result = sum(max(map(_bytes, own), default=0) for own in dealt[: len(files)])
    else:
        result = _bytes(saved_weights(plan, weights))
    return _buffers_of_node(plan, files, weights) + max(written, result)


def buffers_bytes(plan: RunPlan, weights: Sequence[WeightTensor]) -> int:
    """Return the copies that the first node's ranks keep from save to save (`HostBuffers` in `train/checkpoint/`)."""
    return _buffers_of_node(plan, _files_of_ranks(plan, weights), weights)


def _buffers_of_node(plan: RunPlan, files: Sequence[Sequence[File]], weights: Sequence[WeightTensor]) -> int:
    if not plan.recipe.checkpoint.asynchronous:
        return 0
    # An adapter is gathered at once by the first rank, which alone writes it.
    adapter = [] if plan.recipe.method.trains_base else [each.bytes for each in saved_weights(plan, weights)]
    total = 0
    for rank in range(plan.topology.processes_per_node):
        sizes = list(adapter) if rank == 0 else []
        if plan.topology.engine in ("fsdp2", "hsdp"):
            ranks = training_state.shard_ranks(plan)
            first = rank // ranks * ranks
            group = [tensor for own in files[first : first + ranks] for file in own for tensor in file]
            sizes += [tensor.rows_bytes(ranks) for tensor in group]
        else:
            sizes += [tensor.bytes for file in files[rank] for tensor in file]
        total += _buffers(plan, sizes)
    return total


def _files_of_ranks(plan: RunPlan, weights: Sequence[WeightTensor]) -> list[list[File]]:
    """Return the files that each rank writes, without an adapter's, which the first rank writes."""
    world = plan.topology.world_size
    if plan.recipe.method.trains_base:
        loads = [(0, rank) for rank in range(world)]
        dealt = _deal(_model_files(plan, weights), loads)
    else:
        loads = [(_bytes(saved_weights(plan, weights)) if rank == 0 else 0, rank) for rank in range(world)]
        heapq.heapify(loads)
        dealt = [[] for _ in loads]
    states = _deal([[state] for state in saved_states(plan, weights)], loads)
    return [own + _in_files(of_rank) for own, of_rank in zip(dealt, states, strict=True)]


def _deal(files: Iterable[File], loads: list[tuple[int, int]]) -> list[list[File]]:
    """Return the files of each rank: each goes to the rank with the fewest bytes in the heap `loads`."""
    dealt: list[list[File]] = [[] for _ in loads]
    for file in files:
        load, rank = loads[0]
        dealt[rank].append(file)
        heapq.heapreplace(loads, (load + _bytes(file), rank))
    return dealt


def _model_files(plan: RunPlan, weights: Sequence[WeightTensor], width: int | None = None) -> list[File]:
    """Return the files of a whole model, cut between units; `width` is that of the result."""
    units: dict[str, File] = {}
    for weight, tensor in zip(weights, saved_weights(plan, weights), strict=True):
        units.setdefault(weight.unit, []).append(tensor if width is None else SavedTensor(tensor.shape, width))
    return _in_files(units.values())


def _in_files(groups: Iterable[File]) -> list[File]:
    files: list[File] = []
    size = 0
    for group in groups:
        if files and size + _bytes(group) <= FILE_BYTES:
            files[-1] = files[-1] + group
            size += _bytes(group)
        else:
            files.append(list(group))
            size = _bytes(group)
    return files


def _buffers(plan: RunPlan, sizes: Sequence[int]) -> int:
    """Return the memory of one rank's copies; without pinning, only pages that are written take memory."""
    return slabs_bytes(sizes) if plan.topology.device == "cuda" else sum(sizes)


def _bytes(tensors: Iterable[SavedTensor]) -> int:
    return sum(tensor.bytes for tensor in tensors)
