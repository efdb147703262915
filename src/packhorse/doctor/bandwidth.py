"""One rank of a timed all-reduce: `python -m packhorse.doctor.bandwidth BACKEND`, with torch's variables set.

Rank 0 prints one line of JSON. Bus bandwidth is that of nccl-tests (doc/PERFORMANCE.md): 2 (n - 1)/n x bytes / seconds,
the rate at which a ring of n ranks loads its slowest link, independent of n.
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta
from typing import Final

import torch
import torch.distributed as dist

SMALL_BYTES: Final = 8 * 2**10
SMALL_TIMES: Final = 50
LARGE_BYTES: Final = {"nccl": 256 * 2**20, "gloo": 32 * 2**20}
LARGE_TIMES: Final = {"nccl": 10, "gloo": 3}
TIMEOUT: Final = timedelta(minutes=10)
"""Longer than the node waits for its ranks, which then reports that they did not finish, and not that they failed."""


def main() -> int:
    """Measure the all-reduce; rank 0 prints the result."""
    backend = sys.argv[1]
    on_gpu = backend == "nccl"
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(backend, timeout=TIMEOUT, device_id=device if on_gpu else None)
    world, rank = dist.get_world_size(), dist.get_rank()
    small = _seconds(SMALL_BYTES, SMALL_TIMES, device)
    large = _seconds(LARGE_BYTES[backend], LARGE_TIMES[backend], device)
    dist.destroy_process_group()
    if rank == 0:
        result = {
            "world_size": world,
            "backend": backend,
            "small_bytes": SMALL_BYTES,
            "small_seconds": small,
            "large_bytes": LARGE_BYTES[backend],
            "bus_bytes_per_second": 2 * (world - 1) / world * LARGE_BYTES[backend] / large,
        }
        sys.stdout.write(json.dumps(result) + "\n")
    return 0


def _seconds(num_bytes: int, times: int, device: torch.device) -> float:
    """Return the seconds of one all-reduce of fp32 zeros, after two that connect the ranks."""
    values = torch.zeros(num_bytes // 4, device=device)
    for _ in range(2):
        dist.all_reduce(values)
    _wait(device)
    began = time.perf_counter()
    for _ in range(times):
        dist.all_reduce(values)
    _wait(device)
    return (time.perf_counter() - began) / times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    sys.exit(main())
