"""The script that `accelerate launch` runs, one process per device.

accelerate launch --config_file accelerate_configs/ddp.yaml launch/train.py RUN/plan.json
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from packhorse.library_hooks import check_library_hooks
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
    planned = json.loads(plan_file.read_text(encoding="utf-8"))["env"]
    if "PYTORCH_ALLOC_CONF" in os.environ or "PYTORCH_CUDA_ALLOC_CONF" in os.environ:
        # The user has set the allocator; of two names torch would read the plan's older one first.
        planned.pop("PYTORCH_CUDA_ALLOC_CONF", None)
    os.environ.update(planned)
    try:
        from packhorse.train.worker import run_worker
    except ImportError:
        check_library_hooks()  # raises a clear error where a library lacks a name
        raise

    return run_worker(plan_file, signals)


if __name__ == "__main__":
    sys.exit(main())
