"""What a node knows of itself without asking anybody: versions, GPUs, memory, local disk."""

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

from packhorse.doctor.facts import Gpu, GpuFacts, RoomFacts
from packhorse.errors import UserError
from packhorse.recipe.locate import path_of
from packhorse.version import VERSION

PACKAGES: Final = (
    "torch",
    "accelerate",
    "deepspeed",
    "transformers",
    "tokenizers",
    "peft",
    "bitsandbytes",
    "safetensors",
    "numpy",
)
NCCL: Final = re.compile(r"nvidia-nccl-cu\d+")
SMI_SECONDS: Final = 15.0
GPU_FIELDS: Final = "index,uuid,name,memory.total,memory.used"
INFINIBAND: Final = Path("/sys/class/infiniband")
SHM: Final = Path("/dev/shm")  # noqa: S108  (asked for its size)


def versions() -> dict[str, str]:
    """Python, Packhorse and the libraries whose versions must be the same on all nodes; imports none of them."""
    found = {"python": platform.python_version(), "packhorse": VERSION}
    for installed in distributions():
        name = (installed.name or "").lower()
        # The first one on the path is the one that is imported.
        if name in PACKAGES or NCCL.fullmatch(name):
            found.setdefault(name, installed.version)
    return found


def gpu_facts() -> GpuFacts:
    """GPUs by nvidia-smi, the driver by its own library, torch's CUDA by a file of its package."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    installed, error = _listed()
    chosen = installed if visible is None else _visible(installed, visible)
    return GpuFacts(
        gpus=tuple(gpu for _, gpu in chosen),
        installed=len(installed),
        visible=visible,
        error=error,
        driver_cuda=_driver_cuda(),
        torch_cuda=torch_built_for("cuda"),
        torch_rocm=torch_built_for("hip"),
    )


def _listed() -> tuple[list[tuple[str, Gpu]], str]:
    command = shutil.which("nvidia-smi")
    if command is None:
        return [], "there is no nvidia-smi"
    query = [command, f"--query-gpu={GPU_FIELDS}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=SMI_SECONDS, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired) as error:
        return [], f"nvidia-smi: {error}"
    if answer.returncode != 0:
        said = (answer.stderr or answer.stdout).strip().splitlines()
        return [], f"nvidia-smi ended with {answer.returncode}: {said[-1] if said else 'nothing said'}"
    found = []
    for row in csv.reader(answer.stdout.splitlines(), skipinitialspace=True):
        index, uuid, name, total, used = row
        found.append((uuid, Gpu(index=index, name=name, memory_mib=_number(total), used_mib=_number(used))))
    return found, ""


def _number(text: str) -> int:
    # A card with memory shared with the host says [N/A].
    return int(text) if text.strip().isdecimal() else 0


def _visible(installed: list[tuple[str, Gpu]], visible: str) -> list[tuple[str, Gpu]]:
    """What CUDA_VISIBLE_DEVICES leaves; CUDA stops reading it at the first word that names no device.

    Where a cgroup hides devices, nvidia-smi lists those of the job only, and Slurm counts them from 0.
    """
    chosen = []
    for word in (part.strip() for part in visible.split(",")):
        if word.startswith("MIG-"):  # a part of a card, which nvidia-smi does not list as one
            chosen.append((word, Gpu(index=word, name="MIG", memory_mib=0, used_mib=0)))
            continue
        found = [gpu for gpu in installed if word and (gpu[1].index == word or gpu[0].startswith(word))]
        if not found:
            break
        chosen.append(found[0])
    return chosen


def _driver_cuda() -> str:
    """Newest CUDA of the driver, by cuDriverGetVersion of the CUDA driver API: 12080 is 12.8."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ""
    number = ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(number)) != 0:
        return ""
    return f"{number.value // 1000}.{number.value % 1000 // 10}"


def torch_built_for(kind: Literal["cuda", "hip"]) -> str:
    """CUDA or ROCm of this build of torch, from torch/version.py: importing torch takes seconds."""
    found = find_spec("torch")
    if found is None or found.origin is None:
        return ""
    file = Path(found.origin).with_name("version.py")
    try:
        text = file.read_text(encoding="utf-8")
    except OSError:
        return ""
    built = re.search(rf"^{kind}\b[^=\n]*=\s*['\"]([\d.]+)", text, re.MULTILINE)
    return built.group(1) if built else ""


def room_facts(asked_scratch: str) -> RoomFacts:
    """Memory that this process may take, shared memory, and the folder for what is this node's own.

    Args:
        asked_scratch: May name variables of this node; empty: TMPDIR, else /tmp, as the job script takes it.
    """
    error, free, scratch = "", 0, Path(os.environ.get("TMPDIR") or "/tmp")  # noqa: S108
    try:
        scratch = path_of(asked_scratch) if asked_scratch else scratch
        scratch.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=scratch) as file:
            file.write(bytes(2**20))
            file.flush()
        free = shutil.disk_usage(scratch).free
    except OSError as fault:
        error = f"{scratch}: {fault.strerror}"
    except UserError as mistake:
        error = mistake.mistakes[0].fact
    memory, source = memory_limit()
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return RoomFacts(
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


def memory_limit(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> tuple[int, str]:
    """The least of the machine's memory, the limits of our cgroup and those above it, and what Slurm granted.

    Limits of cgroups: memory.max in version 2, memory.limit_in_bytes in version 1 (kernel documentation).
    """
    text = (proc / "meminfo").read_text(encoding="utf-8")
    found = [(int(re.findall(r"MemTotal:\s+(\d+) kB", text)[0]) * 1024, "the machine")]
    for line in (proc / "self/cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, name = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, file = (cgroups / "memory", "memory.limit_in_bytes") if controllers else (cgroups, "memory.max")
        place = root / name.lstrip("/")
        for folder in (place, *place.parents[: len(place.relative_to(root).parts)]):
            limit = folder / file
            if limit.is_file() and (number := limit.read_text(encoding="utf-8").strip()).isdecimal():
                found.append((int(number), "its cgroup"))
    granted = os.environ.get("SLURM_MEM_PER_NODE", "")
    if granted.isdecimal() and int(granted) > 0:
        found.append((int(granted) * 2**20, "its Slurm job"))
    return min(found, key=lambda each: each[0])


def file_system(path: Path, mounts: Path = Path("/proc/self/mounts")) -> str:
    """Type of the file system that a path lies on: nfs4, lustre, gpfs, ext4, tmpfs; empty where it is not known."""
    place, best, kind = str(path.resolve()), "", ""
    for line in mounts.read_text(encoding="utf-8", errors="replace").splitlines():
        _, mounted, found, *_ = line.split(" ")
        mounted = mounted.replace("\\040", " ").rstrip("/")
        if (place == mounted or place.startswith(f"{mounted}/")) and len(mounted) >= len(best):
            best, kind = mounted, found
    return kind
