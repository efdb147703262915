"""Files and folders that appear whole or not at all, and stay after a power cut."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from packhorse.errors import EXIT_DISK, UserError


def publish_folder(temporary: Path, target: Path) -> None:
    """Makes a finished folder appear under its name: its files on disk first, then one rename."""
    for path in sorted(temporary.rglob("*"), reverse=True):
        sync_to_disk(path)
    sync_to_disk(temporary)
    if target.exists():
        shutil.rmtree(target)
    temporary.rename(target)
    sync_to_disk(target.parent)


def replace_file(path: Path, text: str, *, writer: str = "", on_disk: bool = True) -> None:
    """Writes a whole file in one move: a reader, and a crash, meet the old one or the new one.

    Args:
        path: The file.
        text: All that it is to hold.
        writer: Apart from others that may write the same file at the same time.
        on_disk: Wait until it would stay after a power cut.

    Raises:
        OSError: The disk does not take it; the file is as it was.
    """
    draft = path.with_name(f".{path.name}{writer}")
    try:
        draft.write_text(text, encoding="utf-8")
        if on_disk:
            sync_to_disk(draft)
        draft.replace(path)
    except OSError:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        raise
    if on_disk:
        sync_to_disk(path.parent)


def sync_to_disk(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on disk (fsync(2))."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def forget_cached(path: Path) -> None:
    """Lets what is read next come from the disk, not from memory, where the system offers it (posix_fadvise(2))."""
    if not hasattr(os, "posix_fadvise"):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def disk_error(target: Path, error: Exception) -> UserError:
    """What a user reads when a folder of a run could not be written."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    return UserError(
        f"{target} could not be written: {reason} ({_free(target)}).",
        "what was half written is removed; earlier checkpoints stand.",
        "free space there, then go on with `packhorse train RUN --resume`.",
        exit_code=EXIT_DISK,
    )


def size(num_bytes: float) -> str:
    """A number of bytes as a user reads it."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def _free(target: Path) -> str:
    existing = next(parent for parent in target.absolute().parents if parent.exists())
    try:
        return f"{size(shutil.disk_usage(existing).free)} are free"
    except OSError as error:  # a disk that refuses may refuse this too
        return f"{existing}: {error.strerror}"
