"""Where DeepSpeed's C++ parts are built: once for each environment and machine, never behind a lock that nobody holds.

torch keeps them in one folder for every environment of a user. Two environments then build them anew by turns, at
every run, and a build that was killed leaves a lock at which all later runs wait for ever.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

FOLDER_VARIABLE = "TORCH_EXTENSIONS_DIR"
LIBRARIES = ("torch", "deepspeed")


def extensions_folder() -> Path:
    """The user's own choice, or one of this environment on this machine, whose instructions they are built for."""
    chosen = os.environ.get(FOLDER_VARIABLE)
    if chosen:
        return Path(chosen)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    environment = "\n".join([platform.node(), sys.prefix, *(f"{name} {_version(name)}" for name in LIBRARIES)])
    return cache / "packhorse" / "extensions" / hashlib.sha256(environment.encode()).hexdigest()[:12]


def remove_abandoned_locks(folder: Path) -> list[Path]:
    """Removes locks that no process of this machine holds open; returns them. None of a folder that the user chose."""
    if os.environ.get(FOLDER_VARIABLE):
        return []
    locks = [*folder.glob("*/lock"), *folder.glob("*/*/lock")]
    held = _open_files() if locks else set()
    abandoned = [lock for lock in locks if lock.resolve() not in held]
    for lock in abandoned:
        lock.unlink(missing_ok=True)
    return abandoned


def _open_files() -> set[Path]:
    found = set()
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            found.add(descriptor.readlink())
        except OSError:  # ended meanwhile, or another user's
            continue
    return found


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"
