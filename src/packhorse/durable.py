"""Folders that appear whole or not at all, and stay after a power cut."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from packhorse.errors import UserError


def publish_folder(temporary: Path, target: Path) -> None:
    """Makes a finished folder appear under its name: its files on disk first, then one rename."""
    for path in sorted(temporary.rglob("*"), reverse=True):
        sync_to_disk(path)
    sync_to_disk(temporary)
    if target.exists():
        shutil.rmtree(target)
    temporary.rename(target)
    sync_to_disk(target.parent)


def sync_to_disk(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on disk (fsync(2))."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def disk_error(target: Path, error: Exception) -> UserError:
    """What a user reads when a folder of a run could not be written."""
    free = shutil.disk_usage(target.parent).free
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    return UserError(
        f"{target} could not be written: {reason} ({free / 1e9:.1f} GB are free).",
        "what was half written is removed; earlier checkpoints stand.",
        "free space there, then go on with `packhorse train RUN --resume`.",
    )
