"""A process that has loaded soft CUDA and all that a rank imports, and forks the ranks of each run named on its input.

Proves what the worker does from its first line to its exit code on a machine with GPUs. The launcher is not in it: its
variables are computed by accelerate's own hand (tests/ranks.py), as on such a machine.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import soft_device

soft_device.load()

import soft_bitsandbytes  # noqa: E402
import soft_nccl  # noqa: E402

soft_nccl.install()
soft_bitsandbytes.install()

from soft_waits import record_waits  # noqa: E402

from ranks import IMPORTED, run_ranks  # noqa: E402


def main() -> None:
    """Serve until the input ends: each line names a run and an attempt, each answer lists the records of its ranks."""
    for module in IMPORTED:
        __import__(module)
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        run = Path(request["run"])
        records = run_ranks(run, attempt=request["attempt"], before=record_waits)
        print(json.dumps(records), flush=True)


if __name__ == "__main__":
    main()
