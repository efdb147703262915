"""Which of how many processes this one is; one alone has no process group."""

from __future__ import annotations

import torch.distributed as dist


def own_rank() -> int:
    """Number of this process. Not from the Accelerator: under DeepSpeed on the CPU it may be wrong on every rank."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Processes in all."""
    return dist.get_world_size() if dist.is_initialized() else 1
