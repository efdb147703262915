"""One rank of a peer in engines.py: the bare loop or TRL, on the packs of this rank. Started by `accelerate launch`.

    accelerate launch ... benchmarks/peer.py NAME RUN_FOLDER

Writes RUN_FOLDER/NAME-RANK.jsonl: a line a step, with the clock's seconds and the tokens.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from contestants import CONTESTANTS, Workload
from packhorse.plan.run_plan import read_plan


def main() -> int:
    """Trains as the peer that the command line names."""
    name, folder = sys.argv[1], Path(sys.argv[2])
    plan = read_plan(folder)
    rank = int(os.environ.get("RANK", "0"))
    torch.set_num_threads(1)
    if plan.topology.world_size > 1:
        dist.init_process_group("gloo")
    with (folder / f"{name}-{rank}.jsonl").open("w", encoding="utf-8") as log:

        def at_step(num_tokens: int, num_supervised_tokens: int, loss: float) -> None:
            record = {"time": time.monotonic(), "tokens": num_tokens, "loss": loss}
            log.write(json.dumps(record) + "\n")
            log.flush()

        CONTESTANTS[name](plan, Workload(plan, rank), at_step)
    return 0


if __name__ == "__main__":
    sys.exit(main())
