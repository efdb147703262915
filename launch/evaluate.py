"""The script that `accelerate launch` runs to measure the models of a run, one process per device.

accelerate launch --config_file accelerate_configs/fsdp2.yaml launch/evaluate.py RUN/evaluation/ranks/plan.json
"""

from __future__ import annotations

import sys
from pathlib import Path

from packhorse.plan.command import set_worker_env
from packhorse.secrets import mask_output


def main() -> int:
    """Set the plan's environment before torch is imported, which reads some of it, and measure."""
    # First, because libraries keep references to the streams when they are imported.
    mask_output()
    plan_file = Path(sys.argv[1])
    set_worker_env(plan_file)
    from packhorse.evaluate.distributed.worker import run_worker

    return run_worker(plan_file)


if __name__ == "__main__":
    sys.exit(main())
