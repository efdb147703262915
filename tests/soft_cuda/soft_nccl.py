"""NCCL of soft CUDA: gloo over the same memory.

Proves which tensors reach which collective of which group: like NCCL it takes no tensor of the CPU, none of another
device and none with gaps. Cannot prove the order of streams, time-outs, NCCL's own sums (it adds in another order), or
any speed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d


class _IsGloo(type):
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, dist.ProcessGroupGloo)


class ProcessGroupNCCL(metaclass=_IsGloo):
    """What torch's own code makes of the backend `nccl`."""

    class Options:
        config = None
        is_high_priority_stream = False

    def __new__(cls, store: Any, rank: int, size: int, options: Any) -> Any:
        return dist.ProcessGroupGloo(store, rank, size, timeout=options._timeout)


def install() -> None:
    """Give this process the backend `nccl`."""
    c10d.ProcessGroupNCCL = dist.ProcessGroupNCCL = ProcessGroupNCCL
    c10d._NCCL_AVAILABLE = True
    torch.cuda.nccl.version = lambda: (2, 27, 3)
    # DDP times its passes with CUDA's events, in C++.
    dist.Logger.set_runtime_stats_and_log = lambda self: None
    original = c10d._new_process_group_helper

    def new_group(*words: Any, **more: Any) -> Any:
        group, *rest = original(*words, **more)
        if isinstance(group, dist.ProcessGroup):
            _register_for_device(group)
        return group, *rest

    c10d._new_process_group_helper = new_group


def _register_for_device(group: dist.ProcessGroup) -> None:
    """Register the group's NCCL under the device name by which device.cpp calls it with tensors of the host."""
    try:
        backend = group._get_backend(torch.device("cuda"))
    except RuntimeError:  # a group of gloo alone
        return
    group._register_backend(torch.device("privateuseone"), dist.ProcessGroup.BackendType.NCCL, backend)
