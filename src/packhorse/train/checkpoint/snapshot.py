"""Copies everything that a checkpoint saves to the host while the step loop waits.

For a tensor that FSDP2 shards by rows, each rank copies its own rows. The rank that writes the tensor gathers it later,
in the writing threads: over a separate gloo group, whose ranks visit the same tensors in the same order.

    rows of a tensor    [ rank 0 ][ rank 1 ][ rank 2]    cut as by torch.chunk: the last may have fewer, or none

Under hsdp each copy of the weights has such a group, and only that of the writing rank takes part. Every other tensor
is already whole, and copied by the rank that writes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Final, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from packhorse.plan.run_plan import Topology
from packhorse.run_folder.checkpoints.pinned_slabs import PinnedSlabs

WEIGHTS_OWNER: Final = 0
GATHER_TIMEOUT: Final = timedelta(days=1)
"""Long, because ranks wait while one writes all weights to a slow disk; a rank that dies closes its connections."""


class HostBuffers:
    """Memory on the host for one copy of everything that is saved, kept from save to save.

    Measured on two CPU cores, 1 GB in tensors of 64 MB: 0.80 s into new memory, 0.05 s into memory that was written
    before. For a GPU it is pinned, which torch documents as faster to copy to
    (docs.pytorch.org/tutorials/intermediate/pinmem_nonblock.html); this was not measured. Many copies lie in one slab,
    each with its own storage, because safetensors would clone tensors that share one.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._slabs = PinnedSlabs()
        self._memory: list[Tensor] = []

    def copy(self, name: str, tensor: Tensor, num_rows: int | None = None) -> Tensor:
        """Return a copy on the CPU, padded to `num_rows` with any values; the next copy of that name overwrites it."""
        shape = tensor.shape if num_rows is None else (num_rows, *tensor.shape[1:])
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != shape or buffer.dtype != tensor.dtype:
            buffer = self._buffers[name] = self._new_buffer(torch.Size(shape), tensor.dtype, pinned=tensor.is_cuda)
        (buffer if num_rows is None else buffer[: len(tensor)]).copy_(tensor.detach())
        return buffer

    def _new_buffer(self, shape: torch.Size, dtype: torch.dtype, pinned: bool) -> Tensor:
        if not shape.numel():
            return torch.empty(shape, dtype=dtype)
        slab, begin = self._slabs.place(shape.numel() * dtype.itemsize)
        if slab == len(self._memory):
            self._memory.append(torch.empty(self._slabs.sizes[slab], dtype=torch.uint8, pin_memory=pinned))
        return torch.frombuffer(self._memory[slab].numpy(), dtype=dtype, count=shape.numel(), offset=begin).view(shape)


class ShardGroup:
    """The ranks that together hold one copy of the weights; for threads, while training uses other groups."""

    def __init__(self, topology: Topology) -> None:
        """Create the groups; a collective of all ranks, in the main thread."""
        world = topology.world_size
        size = topology.shard_group or world
        ranks = [list(range(first, first + size)) for first in range(0, world, size)]
        group: dist.ProcessGroup = dist.new_subgroups_by_enumeration(  # type: ignore[no-untyped-call]
            ranks, timeout=GATHER_TIMEOUT, backend="gloo", group_desc="checkpoint"
        )[0]
        self._group = group
        self._first = dist.get_rank() // size * size
        self.size = size

    def __contains__(self, rank: int) -> bool:
        return 0 <= rank - self._first < self.size

    def gather(self, rows: Tensor, whole: Tensor | None, owner: int) -> None:
        """Send each rank's rows to the owner, which alone passes memory for the whole tensor; a collective."""
        parts = None if whole is None else list(whole.chunk(self.size))
        dist.gather(rows, parts, group=self._group, group_dst=owner - self._first)


@dataclass(frozen=True)
class _Rows:
    """This rank's rows of a tensor, padded to the number of the first rank."""

    rows: Tensor
    num_rows: int
    owner: int


class Snapshot:
    """One checkpoint's tensors on the host of this rank.

    Filled while the step loop waits, by all ranks with the same tensors in the same order; then `gather_weights` and
    `states` are called once each, in this order, by a thread of every rank.
    """

    def __init__(self, buffers: HostBuffers, rank: int, group: ShardGroup | None) -> None:
        self.copy = buffers.copy
        self._rank = rank
        self._group = group
        self._weights: list[tuple[_Rows, Tensor | None]] = []
        self._states: list[tuple[str, Tensor | _Rows]] = []

    def takes_shard(self, tensor: Tensor) -> TypeGuard[DTensor]:
        """Return whether each rank may copy just its rows of this tensor."""
        if self._group is None or not isinstance(tensor, DTensor):
            return False
        *copies, shard = tensor.placements
        return shard == Shard(0) and all(placement.is_replicate() for placement in copies)

    def hold_weight(self, name: str, weight: DTensor) -> Tensor:
        """Copy this rank's rows; the tensor returned on rank 0 is the whole weight after `gather_weights`."""
        rows = self._rows(name, weight, WEIGHTS_OWNER)
        whole = self._whole(rows)
        if rows is not None:
            self._weights.append((rows, whole))
        return torch.empty(0) if whole is None else whole[: len(weight)]

    def hold_state(self, key: str, state: Tensor, owner: int) -> None:
        """Copy this rank's part of a state of the optimizer that `owner` writes."""
        if self.takes_shard(state):
            held: Tensor | _Rows | None = self._rows(key, state, owner)
        else:
            held = self.copy(key, state) if owner == self._rank else None
        if held is not None:
            self._states.append((key, held))

    def gather_weights(self) -> None:
        """Fill the weights on rank 0; a collective."""
        for rows, whole in self._weights:
            self._gather(rows, whole)

    def states(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the states that this rank writes, whole; a collective, to be consumed to the end."""
        for key, held in self._states:
            if isinstance(held, Tensor):
                yield key, held
                continue
            whole = self._whole(held)
            self._gather(held, whole)
            if whole is not None:
                yield key, whole[: held.num_rows]

    def _rows(self, name: str, tensor: DTensor, owner: int) -> _Rows | None:
        """Copy this rank's rows; None where the owner is in another group."""
        assert self._group is not None
        if owner not in self._group:
            return None
        with torch.no_grad():
            local = tensor.to_local()
        return _Rows(self.copy(name, local, -(-len(tensor) // self._group.size)), len(tensor), owner)

    def _whole(self, rows: _Rows | None) -> Tensor | None:
        """Return memory for the padded rows of all ranks on the owner, None on other ranks."""
        if rows is None or rows.owner != self._rank:
            return None
        assert self._group is not None
        shape = (len(rows.rows) * self._group.size, *rows.rows.shape[1:])
        return torch.empty(shape, dtype=rows.rows.dtype)

    def _gather(self, rows: _Rows, whole: Tensor | None) -> None:
        assert self._group is not None
        self._group.gather(rows.rows, whole, rows.owner)
