"""Copies everything that a checkpoint saves to the host while the step loop waits.

For a tensor that FSDP2 shards by rows, each rank copies its own rows. The rank that writes the tensor gathers it later,
in the writing threads: over a separate gloo group, whose ranks visit the same tensors in the same order.

    rows of a tensor    [ rank 0 ][ rank 1 ][ rank 2]    cut as by torch.chunk: the last may have fewer, or none

Under hsdp each copy of the weights has such a group, and only that of the writing rank takes part. Every other tensor
is already whole, and copied by the rank that writes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor

from packhorse.model.sharded import is_by_rows
from packhorse.plan.run_plan import Topology
from packhorse.run_folder.checkpoints.pinned_slabs import PinnedSlabs
from packhorse.train.checkpoint.saved_tensor import SavedTensor

GATHER_TIMEOUT: Final = timedelta(days=1)
"""Long, because ranks wait while others write their files to a slow disk; a rank that dies closes its connections."""


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
    """This rank's rows of a tensor, padded to the number of the first rank; rows of the whole tensor."""

    rows: Tensor
    num_rows: int


class Snapshot:
    """One checkpoint's tensors on the host of this rank.

    Filled while the step loop waits, by all ranks with the same tensors in the same order; a thread of every rank then
    takes them, again all in one order.
    """

    def __init__(self, buffers: HostBuffers, rank: int, group: ShardGroup | None) -> None:
        self.copy = buffers.copy
        self._rank = rank
        self._group = group
        self._held: dict[str, Tensor | _Rows] = {}

    def hold(self, tensor: SavedTensor, owner: int) -> None:
        """Copy this rank's part of a tensor that `owner` writes; a collective where it is not sharded by rows."""
        if self._group is not None and tensor.shard is not None and is_by_rows(tensor.shard):
            if owner in self._group:
                with torch.no_grad():
                    local = tensor.shard.to_local()
                num_rows = tensor.shape[0]
                self._held[tensor.key] = _Rows(self.copy(tensor.key, local, -(-num_rows // self._group.size)), num_rows)
            return
        with tensor.whole() as value:
            if owner == self._rank:
                self._held[tensor.key] = self.copy(tensor.key, value)

    def take(self, tensor: SavedTensor, owner: int) -> Tensor | None:
        """Return the whole tensor on the rank that writes it, None on others; a collective of its shard group."""
        held = self._held.get(tensor.key)
        if not isinstance(held, _Rows):
            return held
        assert self._group is not None
        whole = None
        if owner == self._rank:
            shape = (len(held.rows) * self._group.size, *held.rows.shape[1:])
            whole = torch.empty(shape, dtype=held.rows.dtype)
        self._group.gather(held.rows, whole, owner)
        return None if whole is None else whole[: held.num_rows]
