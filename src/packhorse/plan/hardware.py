"""What this machine has, found without importing torch."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from packhorse.plan.run_plan import Device


@dataclass(frozen=True)
class Hardware:
    """Devices of one machine.

    Attributes:
        num_cores: CPU cores that this process may use.
        gpus: Name of each visible NVIDIA GPU, in order.
        host_bytes: Memory of the machine, or of the control group that this process is held to; None: not known.
    """

    num_cores: int
    gpus: tuple[str, ...]
    host_bytes: int | None = None

    @property
    def device(self) -> Device:
        """Where training runs: on the GPUs if there is one."""
        return "cuda" if self.gpus else "cpu"


def detect_hardware() -> Hardware:
    """Counts cores and asks nvidia-smi for GPUs; CUDA_VISIBLE_DEVICES hides what it does not name."""
    cores = len(os.sched_getaffinity(0))
    return Hardware(num_cores=cores, gpus=_visible(_installed_gpus()), host_bytes=host_memory())


def host_memory(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that this process may fill: of the machine, or less where a container or a Slurm job is limited.

    Args:
        proc: Where Linux tells of processes.
        groups: Where it tells of control groups, version 2 or 1.
    """
    try:
        line = next(line for line in (proc / "meminfo").read_text(encoding="utf-8").splitlines() if "MemTotal" in line)
    except (OSError, StopIteration):
        return None
    return min(int(line.split()[1]) * 1024, *_limits(proc, groups), 2**63)


def _limits(proc: Path, groups: Path) -> Iterator[int]:
    """Of the group that this process is in, and of those around it."""
    try:
        lines = (proc / "self" / "cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers not in ("", "memory"):
            continue
        root, file = (groups / controllers, "memory.limit_in_bytes") if controllers else (groups, "memory.max")
        inside = Path(path.lstrip("/"))
        for group in (inside, *inside.parents):
            try:
                word = (root / group / file).read_text(encoding="utf-8").strip()
            except OSError:
                continue
            if word.isdigit():
                yield int(word)


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
