"""The script that `accelerate launch` runs, one process per device.

accelerate launch --config_file accelerate_configs/ddp.yaml launch/train.py RUN/plan.json
"""

from __future__ import annotations

import sys
from pathlib import Path

from packhorse.library_hooks import check_library_hooks
from packhorse.plan.command import set_worker_env
from packhorse.secrets import mask_output
from packhorse.train.ranks.signals import StopRequest


def main() -> int:
    """Set the plan's environment before torch is imported, which reads some of it, and run the worker."""
    plan_file = Path(sys.argv[1]) if len(sys.argv) == 2 else None
    if plan_file is None or not plan_file.is_file():
        sys.stderr.write("usage: accelerate launch --config_file FILE launch/train.py RUN/plan.json\n")
        return 2
    # First, because libraries keep references to the streams when they are imported.
    mask_output()
    signals = StopRequest()
    signals.install()
    set_worker_env(plan_file)
    try:
        from packhorse.train.worker import run_worker
    except ImportError:
        check_library_hooks()  # raises a clear error where a library lacks a name
        raise

    return run_worker(plan_file, signals)


if __name__ == "__main__":
    sys.exit(main())
