"""Facts of this machine alone: versions, GPUs, memory, local disk."""

from __future__ import annotations

import csv
import ctypes
import os
import platform
import re
import resource
import shutil
import subprocess
import tempfile
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Final, Literal

from packhorse.doctor.facts import Gpu, GpuFacts, ResourceFacts
from packhorse.errors import UserError
from packhorse.plan.topology import memory_limits
from packhorse.plan.visible_gpus import visible_devices
from packhorse.recipe.locate import path_of
from packhorse.version import VERSION

PACKAGES: Final = {"torch", "accelerate", "deepspeed", "transformers", "tokenizers", "peft", "bitsandbytes",
                   "safetensors", "numpy"}  # fmt: skip
NCCL: Final = re.compile(r"nvidia-nccl-cu\d+")
SMI_SECONDS: Final = 15.0
GPU_FIELDS: Final = "index,uuid,name,memory.total,memory.used"
INFINIBAND: Final = Path("/sys/class/infiniband")
SHM: Final = Path("/dev/shm")  # noqa: S108  (only its size is read)


def versions() -> dict[str, str]:
    """Return the versions that must be the same on all nodes; imports none of the libraries."""
    found = {"python": platform.python_version(), "packhorse": VERSION}
    for installed in distributions():
        name = (installed.name or "").lower()
        # Python imports the first distribution on the path.
        if name in PACKAGES or NCCL.fullmatch(name):
            found.setdefault(name, installed.version)
    return found


def gpu_facts() -> GpuFacts:
    """Return GPUs (nvidia-smi), the driver's CUDA (its library), and torch's CUDA (a file of its package)."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    installed, error = _list_gpus()
    chosen = [gpu for _, gpu in installed]
    if visible is not None:
        chosen = [
            chosen[device] if isinstance(device, int) else Gpu(index=device, name="MIG", memory_mib=0, used_mib=0)
            for device in visible_devices([uuid for uuid, _ in installed], visible)
        ]
    return GpuFacts(
        gpus=tuple(chosen),
        installed=len(installed),
        visible=visible,
        error=error,
        driver_cuda=_driver_cuda(),
        torch_cuda=torch_built_for("cuda"),
        torch_rocm=torch_built_for("hip"),
    )


def _list_gpus() -> tuple[list[tuple[str, Gpu]], str]:
    command = shutil.which("nvidia-smi")
    if command is None:
        return [], "no nvidia-smi on PATH"
    query = [command, f"--query-gpu={GPU_FIELDS}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=SMI_SECONDS, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired) as error:
        return [], f"nvidia-smi: {error}"
    if answer.returncode != 0:
        lines = (answer.stderr or answer.stdout).strip().splitlines()
        return [], f"nvidia-smi failed with exit code {answer.returncode}: {lines[-1] if lines else 'no output'}"
    gpus = []
    for row in csv.reader(answer.stdout.splitlines(), skipinitialspace=True):
        index, uuid, name, total, used = row
        gpus.append((uuid, Gpu(index=index, name=name, memory_mib=_number(total), used_mib=_number(used))))
    return gpus, ""


def _number(text: str) -> int:
    # A card that shares memory with the host reports [N/A].
    return int(text) if text.strip().isdecimal() else 0


def _driver_cuda() -> str:
    """Return the newest CUDA of the driver; cuDriverGetVersion of the CUDA driver API returns 12080 for 12.8."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ""
    number = ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(number)) != 0:
        return ""
    return f"{number.value // 1000}.{number.value % 1000 // 10}"


def torch_built_for(kind: Literal["cuda", "hip"]) -> str:
    """Return the CUDA or ROCm version of this build of torch, from torch/version.py: importing torch takes seconds."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return ""
    file = Path(spec.origin).with_name("version.py")
    try:
        text = file.read_text(encoding="utf-8")
    except OSError:
        return ""
    built = re.search(rf"^{kind}\b[^=\n]*=\s*['\"]([\d.]+)", text, re.MULTILINE)
    return built.group(1) if built else ""


def resource_facts(scratch_setting: str) -> ResourceFacts:
    """Return memory limit, shared memory, and space in the local scratch folder.

    Args:
        scratch_setting: Folder, possibly with variables of this node; empty for TMPDIR, or /tmp, as in the job script.
    """
    error, free, scratch = "", 0, Path(os.environ.get("TMPDIR") or "/tmp")  # noqa: S108
    try:
        scratch = path_of(scratch_setting) if scratch_setting else scratch
        scratch.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=scratch) as file:
            file.write(bytes(2**20))
            file.flush()
        free = shutil.disk_usage(scratch).free
    except OSError as fault:
        error = f"{scratch}: {fault.strerror}"
    except UserError as mistake:
        error = mistake.mistakes[0].fact
    source, memory = min(memory_limits().items(), key=lambda limit: limit[1], default=("", 0))
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return ResourceFacts(
        scratch=str(scratch),
        scratch_error=error,
        scratch_free_bytes=free,
        scratch_kind=file_system(scratch),
        shm_bytes=shutil.disk_usage(SHM).total if SHM.is_dir() else 0,
        memory_bytes=memory,
        memory_from=source,
        locked_bytes=-1 if locked == resource.RLIM_INFINITY or os.geteuid() == 0 else locked,
        infiniband=INFINIBAND.is_dir() and any(INFINIBAND.iterdir()),
    )


def file_system(path: Path, mounts: Path = Path("/proc/self/mounts")) -> str:
    """Return the type of the file system that a path is on: nfs4, lustre, gpfs, ext4, tmpfs; empty if unknown."""
    location, best, kind = str(path.resolve()), "", ""
    for line in mounts.read_text(encoding="utf-8", errors="replace").splitlines():
        _, mounted, mounted_kind, *_ = line.split(" ")
        mounted = mounted.replace("\\040", " ").rstrip("/")
        if (location == mounted or location.startswith(f"{mounted}/")) and len(mounted) >= len(best):
            best, kind = mounted, mounted_kind
    return kind
