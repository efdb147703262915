"""What a checkpoint holds, tensor by tensor: its room on disk, and the copies on the host while it is written.

`train/checkpoint.py` writes what is counted here: weights by the first rank, each state of the optimizer by the rank
that has least to write so far. Beside training a rank writes from copies, which it keeps from save to save.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Final

from packhorse.estimate import states
from packhorse.estimate.held import Held, held_weights
from packhorse.model_spec.parameters import Shape
from packhorse.plan.run_plan import RunPlan
from packhorse.run_folder.checkpoints.pinned_slabs import slabs_bytes

FP32: Final = 4
CODE_BYTES: Final = 4 * 256
"""The values that 8-bit states stand for, which bitsandbytes lists with each tensor (arXiv 2110.02861, section 2)."""
FILE_BYTES: Final = 4 * 2**30
"""States in one file at most, as `train/saving.py` writes them."""


@dataclass(frozen=True)
class Saved:
    """A tensor of a checkpoint.

    Attributes:
        shape: Whole, whatever the sharding is.
        width: Bytes of a number.
    """

    shape: tuple[int, ...]
    width: int

    @property
    def bytes(self) -> int:
        """Of the whole tensor."""
        return prod(self.shape) * self.width

    def rows_bytes(self, ranks: int) -> int:
        """Of the rows that FSDP2 gives to each rank, filled up to as many as the first has."""
        return -(-self.shape[0] // ranks) * prod(self.shape[1:]) * self.width


@dataclass(frozen=True)
class CheckpointRoom:
    """Room for the checkpoints of a run.

    Attributes:
        each_bytes: Of one, but for small files.
        count: How many stand at once, the one that is being written too.
    """

    each_bytes: int
    count: int

    @property
    def total_bytes(self) -> int:
        """Of all of them."""
        return self.each_bytes * self.count


def checkpoint_room(plan: RunPlan, shape: Shape) -> CheckpointRoom | None:
    """Counts the room on disk.

    Args:
        plan: Of the run, with its steps where they are known.
        shape: Of its model.

    Returns:
        None where only the library knows what the method trains.
    """
    held = held_weights(plan, shape)
    return None if held is None else room_of(plan, held)


def room_of(plan: RunPlan, held: Sequence[Held]) -> CheckpointRoom:
    """As `checkpoint_room`, of weights that are listed already."""
    return CheckpointRoom(_bytes(saved_weights(plan, held)) + _bytes(saved_states(plan, held)), _most_at_once(plan))


def _most_at_once(plan: RunPlan) -> int:
    section = plan.recipe.checkpoint
    kept = section.keep_last + section.keep_best
    if section.every_steps is None:
        kept = 1  # that of the end, or of a stop
    elif plan.num_steps is not None:
        kept = min(kept, math.ceil(plan.num_steps / section.every_steps))
    return kept + 1


def saved_weights(plan: RunPlan, held: Sequence[Held]) -> list[Saved]:
    """Trained weights in float32, and the frozen ones of a whole model as they are held."""
    whole = plan.recipe.method.trains_base
    return [Saved(each.shape, FP32 if each.trained else each.width) for each in held if whole or each.trained]


def saved_states(plan: RunPlan, held: Sequence[Held]) -> list[Saved]:
    """What the optimizer keeps, of all ranks; tensors of one number are left out."""
    name = plan.recipe.optimizer.name
    if plan.topology.engine == "zero3_nvme":
        return []  # DeepSpeed does not bring them back from its files
    trained = [each for each in held if each.trained]
    if not name.endswith("8bit"):
        return [state for each in trained for state in _states_of(name, each)]
    moments = 1 if name.startswith("lion") else 2
    shapes: Iterable[tuple[int, ...]] = (each.shape for each in trained)
    if states.is_deepspeed(plan):
        shapes = ((states.trained_share(plan, held),) for _ in range(states.shard_ranks(plan)))
    return [state for shape in shapes for _ in range(moments) for state in _in_8_bits(shape)]


def _states_of(name: str, held: Held) -> Iterator[Saved]:
    shape = held.shape
    if name == "adafactor" and len(shape) > 1:
        yield Saved((*shape[:-1], 1), FP32)
        yield Saved((*shape[:-2], 1, shape[-1]), FP32)
        return
    two = name in ("adamw", "paged_adamw") or (name == "muon" and not states.by_muon(held))
    for _ in range(2 if two else 1):
        yield Saved(shape, FP32)


def _in_8_bits(shape: tuple[int, ...]) -> Iterator[Saved]:
    """Numbers, scales of their blocks, and the code."""
    size = prod(shape)
    if size < states.EIGHT_BIT_FROM:
        yield Saved(shape, FP32)
        return
    yield Saved(shape, 1)
    yield Saved((-(-size // states.EIGHT_BIT_BLOCK),), FP32)
    yield Saved((CODE_BYTES // FP32,), FP32)


def copies_bytes(plan: RunPlan, held: Sequence[Held]) -> int:
    """Host memory of the first node for copies of what is saved, when it is fullest.

    What comes out of the run is written by the first rank while the copies for checkpoints stand: its weights once more
    in float32 and, of a whole model, in the type that training computed in.
    """
    weights = saved_weights(plan, held)
    kept = _bytes(weights)
    width = FP32 if plan.recipe.precision == "fp32" else 2
    cast = sum(prod(each.shape) for each in weights) * width if plan.recipe.method.trains_base and width != FP32 else 0
    # FSDP2's shards are put together as they are written; without copies everything is.
    whole = not plan.recipe.checkpoint.asynchronous or plan.topology.engine in ("fsdp2", "hsdp")
    owned = _owned(plan, held)
    files = sum(_in_file(owned[rank]) for rank in range(plan.topology.processes_per_node)) if whole else 0
    return buffers_bytes(plan, held) + kept + max(cast, files)


def buffers_bytes(plan: RunPlan, held: Sequence[Held]) -> int:
    """Of these what the first node's ranks keep from save to save (`HostBuffers` in `train/snapshot.py`)."""
    if not plan.recipe.checkpoint.asynchronous:
        return 0
    owned, weights = _owned(plan, held), saved_weights(plan, held)
    here = range(plan.topology.processes_per_node)
    if plan.topology.engine in ("fsdp2", "hsdp"):
        return sum(_rows_bytes(plan, weights, owned, rank) for rank in here)
    first = [each.bytes for each in weights]
    return sum(_buffers(plan, [*(first if rank == 0 else ()), *(each.bytes for each in owned[rank])]) for rank in here)


def _rows_bytes(plan: RunPlan, weights: Sequence[Saved], owned: Sequence[Sequence[Saved]], rank: int) -> int:
    """Of one rank: its rows of all that is written by the ranks that it shares a copy of the weights with."""
    ranks = states.shard_ranks(plan)
    first = rank // ranks * ranks
    theirs = [each for owner in owned[first : first + ranks] for each in owner]
    return _buffers(plan, [each.rows_bytes(ranks) for each in (*(weights if first == 0 else ()), *theirs)])


def _owned(plan: RunPlan, held: Sequence[Held]) -> list[list[Saved]]:
    """The states that each rank writes, as `train/saving.py` deals them; the first has all weights to write already."""
    loads = [(_bytes(saved_weights(plan, held)) if rank == 0 else 0, rank) for rank in range(plan.topology.world_size)]
    heapq.heapify(loads)
    owned: list[list[Saved]] = [[] for _ in loads]
    for each in saved_states(plan, held):
        load, rank = loads[0]
        owned[rank].append(each)
        heapq.heapreplace(loads, (load + each.bytes, rank))
    return owned


def _in_file(owned: Sequence[Saved]) -> int:
    """States that one rank has whole at a time: those of a file, and the next one."""
    return min(_bytes(owned), FILE_BYTES + max((each.bytes for each in owned), default=0))


def _buffers(plan: RunPlan, sizes: Sequence[int]) -> int:
    """Room for copies on one rank; of what is not pinned only the pages that are written are taken."""
    return slabs_bytes(sizes) if plan.topology.device == "cuda" else sum(sizes)


def _bytes(tensors: Iterable[Saved]) -> int:
    return sum(each.bytes for each in tensors)
