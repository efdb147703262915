"""The processes of a run: rank, world size, and the group on the CPU; a run of one process has no process group."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist

# Long, and never shortened: ranks wait in a collective while rank 0 writes a checkpoint. The hang watch acts earlier,
# and knows whether rank 0 makes progress.
GROUP_TIMEOUT = timedelta(minutes=30)


def own_rank() -> int:
    """Return the rank of this process.

    Not read from the Accelerator: under DeepSpeed on the CPU it may be wrong on every rank.
    """
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def control_group() -> dist.ProcessGroup | None:
    """Return a gloo group of all ranks, None for a run of one process; a collective."""
    if not dist.is_initialized():
        return None
    # The rehearsal (`estimate/measure/rehearse.py`) has no other ranks that could answer.
    backend = "gloo" if dist.get_backend() != "fake" else "fake"
    group: dist.ProcessGroup = dist.new_group(backend=backend, timeout=GROUP_TIMEOUT)
    return group


def from_rank_0(value: int) -> int:
    """Return rank 0's value on every rank; a collective, usable before the engine exists."""
    if not dist.is_initialized():
        return value
    device = torch.accelerator.current_accelerator() if dist.get_backend() != "gloo" else None
    sent = torch.tensor([value], device=device)
    dist.broadcast(sent, src=0)
    return int(sent.item())
