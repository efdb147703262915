"""Variables of a launch, wherever it is started."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from packhorse.plan.run_plan import RANK_LOGS_VARIABLE, Topology


def launch_environment(topology: Topology) -> dict[str, str]:
    """What the launcher sets beside the plan's own variables, which the worker sets for itself."""
    return {
        "OMP_NUM_THREADS": str(topology.threads_per_process),
        # Else torch's agent kills the ranks 30 s after a SIGTERM, in the middle of a long save.
        "PET_SIGNALS_TO_HANDLE": "SIGINT",
        RANK_LOGS_VARIABLE: "1",
    }


def path_with_programs(environment: Mapping[str, str]) -> str:
    """PATH with the programs beside this Python first: accelerate, and ninja for what DeepSpeed builds."""
    return f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', os.defpath)}"
