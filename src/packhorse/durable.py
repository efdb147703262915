"""Files and folders that appear complete or not at all, and survive a power cut."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from packhorse.errors import EXIT_DISK, UserError

if TYPE_CHECKING:
    from pydantic import BaseModel

Record = TypeVar("Record", bound="BaseModel")


def publish_folder(temporary: Path, target: Path) -> None:
    """Bring a finished folder to disk, then rename it to `target`, replacing what is there."""
    for path in sorted(temporary.rglob("*"), reverse=True):
        sync_to_disk(path)
    sync_to_disk(temporary)
    if target.exists():
        shutil.rmtree(target)
    temporary.rename(target)
    sync_to_disk(target.parent)


def replace_file(path: Path, text: str, *, writer: str = "", on_disk: bool = True) -> None:
    """Replace a whole file with one rename: a reader sees the old text or the new one, also after a crash.

    Args:
        path: The file.
        text: Its new content.
        writer: Distinguishes writers that may replace the file at the same time.
        on_disk: Wait until the new content survives a power cut.

    Raises:
        OSError: The disk refuses; the file is unchanged.
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


def append_line(file: Path, record: BaseModel) -> None:
    """Append a record as one line of JSON and wait until it is on disk."""
    with file.open("ab+") as opened:
        # A power cut may have torn the last line: the new one must not be joined to it.
        if opened.tell() and not _ends_with_newline(file):
            opened.write(b"\n")
        opened.write(record.model_dump_json().encode() + b"\n")
        opened.flush()
        os.fsync(opened.fileno())


def read_lines(file: Path, kind: type[Record]) -> list[Record]:
    """Return the records of a file that `append_line` wrote, in order, without torn lines; none for an absent file."""
    records = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else ():
        with suppress(ValueError):  # a torn line
            records.append(kind.model_validate_json(line))
    return records


def sync_to_disk(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on disk (fsync(2))."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def forget_cached(path: Path) -> None:
    """Make the next read of a file come from the disk instead of memory, where possible (posix_fadvise(2))."""
    if not hasattr(os, "posix_fadvise"):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def disk_error(target: Path, error: Exception) -> UserError:
    """Return the error for a file or folder of a run that could not be written."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    return UserError(
        f"{target} could not be written: {reason} ({_free(target)}).",
        "its incomplete files are removed; earlier checkpoints are unchanged.",
        "free space there, then resume with `packhorse resume RUN`.",
        exit_code=EXIT_DISK,
    )


def nearest_existing(folder: Path) -> Path:
    """Return the folder, or the nearest parent that exists."""
    return next(each for each in (folder, *folder.parents) if each.exists())


def size(num_bytes: float) -> str:
    """Return a number of bytes as text: `1.5 GB`, `20.0 MB`."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def _ends_with_newline(file: Path) -> bool:
    with file.open("rb") as opened:
        opened.seek(-1, os.SEEK_END)
        return opened.read(1) == b"\n"


def _free(target: Path) -> str:
    existing = nearest_existing(target.absolute().parent)
    try:
        return f"{size(shutil.disk_usage(existing).free)} are free"
    except OSError as error:  # a disk that refuses writes may refuse this too
        return f"{existing}: {error.strerror}"
