"""Environment variables of a launch, and the folder in which DeepSpeed's C++ extensions are built.

torch keeps extensions in one folder for every environment of a user. Two environments then rebuild them in turn, at
every run, and a build that was killed leaves a lock for which all later runs wait forever.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from packhorse.plan.run_plan import RANK_LOGS_VARIABLE, Topology

FOLDER_VARIABLE: Final = "TORCH_EXTENSIONS_DIR"
LIBRARIES: Final = ("torch", "deepspeed")
OTHER_LAUNCHERS: Final = re.compile(
    r"(LOCAL_|GROUP_|ROLE_|NODE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)"
    r"|(OMPI|PMI|PMIX|MPI|MV2|TORCHELASTIC|PET|ACCELERATE|FSDP)_\w+"
)
"""Variables by which launchers place a rank; those that another launcher left in the shell would misplace ours."""


def launch_environment(topology: Topology) -> dict[str, str]:
    """Return the variables that the launcher sets; the worker itself sets those of the plan."""
    return {
        "OMP_NUM_THREADS": str(topology.threads_per_process),
        # Else torch's agent kills the ranks 30 s after a SIGTERM, in the middle of a long save.
        "PET_SIGNALS_TO_HANDLE": "SIGINT",
        RANK_LOGS_VARIABLE: "1",
    }


def without_other_launchers(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without the variables that another launcher, such as mpirun or torchrun, left in it."""
    return {name: value for name, value in environment.items() if not OTHER_LAUNCHERS.fullmatch(name)}


def path_with_programs(environment: Mapping[str, str]) -> str:
    """Return PATH with the folder of this Python first: it has accelerate, and ninja for DeepSpeed's builds."""
    return f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', os.defpath)}"


def extensions_folder() -> Path:
    """Return the folder that the user chose, else one for this environment on this machine and its instruction set."""
    chosen = os.environ.get(FOLDER_VARIABLE)
    if chosen:
        return Path(chosen)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    environment = "\n".join([platform.node(), sys.prefix, *(f"{name} {_version(name)}" for name in LIBRARIES)])
    return cache / "packhorse" / "extensions" / hashlib.sha256(environment.encode()).hexdigest()[:12]


def remove_abandoned_locks(folder: Path) -> list[Path]:
    """Remove and return the build locks that no process of this machine holds open; none in a folder the user chose."""
    if os.environ.get(FOLDER_VARIABLE):
        return []
    locks = [*folder.glob("*/lock"), *folder.glob("*/*/lock")]
    held = _open_files() if locks else set()
    abandoned = [lock for lock in locks if lock.resolve() not in held]
    for lock in abandoned:
        lock.unlink(missing_ok=True)
    return abandoned


def _open_files() -> set[Path]:
    files = set()
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            files.add(descriptor.readlink())
        except OSError:  # the process has ended meanwhile, or is another user's
            continue
    return files


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"
