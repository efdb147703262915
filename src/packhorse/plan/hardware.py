"""What this machine has, found without importing torch."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass

from packhorse.plan.run_plan import Device


@dataclass(frozen=True)
class Hardware:
    """Devices of one machine.

    Attributes:
        num_cores: CPU cores that this process may use.
        gpus: Name of each visible NVIDIA GPU, in order.
    """

    num_cores: int
    gpus: tuple[str, ...]

    @property
    def device(self) -> Device:
        """Where training runs: on the GPUs if there is one."""
        return "cuda" if self.gpus else "cpu"


def detect_hardware() -> Hardware:
    """Counts cores and asks nvidia-smi for GPUs; CUDA_VISIBLE_DEVICES hides what it does not name."""
    return Hardware(num_cores=len(os.sched_getaffinity(0)), gpus=_visible(_installed_gpus()))


def _installed_gpus() -> tuple[str, ...]:
    command = shutil.which("nvidia-smi")
    if command is None:
        return ()
    query = [command, "--query-gpu=name", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)  # noqa: S603
    return tuple(line.strip() for line in answer.stdout.splitlines() if line.strip()) if answer.returncode == 0 else ()


def _visible(gpus: tuple[str, ...]) -> tuple[str, ...]:
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        return gpus
    # CUDA itself stops reading the list at the first entry that names no device.
    chosen = []
    for word in wanted.split(","):
        if word.startswith("GPU-"):
            chosen.append(word)
        elif word.strip().isdigit() and int(word) < len(gpus):
            chosen.append(gpus[int(word)])
        else:
            break
    return tuple(chosen)
