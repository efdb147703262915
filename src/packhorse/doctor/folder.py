"""Is a folder really shared, does a rename replace a file at once, and is there room: each tried, not asked."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from packhorse.doctor.facts import FolderFacts, Question
from packhorse.doctor.machine import file_system
from packhorse.doctor.meeting import Meeting
from packhorse.run_folder.layout import PLAN_FILE

START_FILE: Final = "start"
CONTEST_FILE: Final = "renamed"
SEE_SECONDS: Final = 5.0
RENAME_SECONDS: Final = 1.0
BLOCK_BYTES: Final = 8
BLOCKS: Final = 8192
SMALL_BYTES: Final = 2**20
LARGE_BYTES: Final = 32 * 2**20


def meeting_place(question: Question) -> Path:
    """Folder of this examination: what never was there cannot be remembered wrongly by a network file system."""
    return Path(question.folder) / f".packhorse-doctor-{question.token}"


def open_place(question: Question) -> Path:
    """Makes the folder of the examination, with the file that every node must see.

    Raises:
        OSError: It cannot be written.
    """
    place = meeting_place(question)
    place.mkdir()
    (place / START_FILE).write_text(question.token, encoding="utf-8")
    return place


def examine_folder(node_id: int, question: Question, meeting: Meeting) -> FolderFacts:
    """Writes a file, reads those of the nodes that it met, and removes its own."""
    folder, place = Path(question.folder), meeting_place(question)
    facts = {
        "exists": folder.is_dir(),
        "kind": file_system(folder),
        "plan_sha256": _plan_in_time(folder, question.plan_sha256),
    }
    facts["sees_start"] = _read(place / START_FILE) == question.token
    write_error, lock_error, speed = _write(place, node_id, question)
    # Nobody looks for a file before it is there: NFS remembers for half a minute that it was not.
    meeting.wait_for_all("written")
    expected = set(meeting.members) - ({node_id} if write_error else set())
    sees = _look_for(expected, place, question.token)
    renames: tuple[int, int, str] = (0, 0, "")
    if not question.fast and question.num_nodes > 1:
        renames = _renames(place, node_id, meeting)
    meeting.wait_for_all("folder")
    with suppress(OSError):
        (place / str(node_id)).unlink()
        place.rmdir()  # not where others are still at it: whoever asked removes it then
    return FolderFacts(
        **facts,
        sees=sees,
        write_error=write_error,
        lock_error=lock_error,
        write_bytes_per_second=speed,
        free_bytes=shutil.disk_usage(folder).free if folder.is_dir() else 0,
        rename_reads=renames[0],
        rename_faults=renames[1],
        rename_fault=renames[2],
    )


def plan_sha256(folder: Path) -> str:
    """Of the plan that this node sees; empty where it sees none."""
    try:
        return hashlib.sha256((folder / PLAN_FILE).read_bytes()).hexdigest()
    except OSError:
        return ""


def _plan_in_time(folder: Path, expected: str) -> str:
    """What is expected, once it is seen: a client of NFS may know the one before for a while."""
    end = time.monotonic() + (SEE_SECONDS if expected else 0.0)
    while (found := plan_sha256(folder)) != expected and time.monotonic() < end:
        time.sleep(0.2)
    return found


def _write(place: Path, node_id: int, question: Question) -> tuple[str, str, float | None]:
    """Writes this node's file, with a large one before it that shows a quota; returns both errors and bytes/s."""
    size = LARGE_BYTES if node_id == 0 and not question.fast else SMALL_BYTES
    large = place / f"{node_id}.large"
    lock_error, began = "", time.monotonic()
    try:
        place.mkdir(parents=True, exist_ok=True)
        with large.open("wb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                lock_error = error.strerror or str(error)
            for _ in range(size // SMALL_BYTES):
                file.write(os.urandom(SMALL_BYTES))
            file.flush()
            os.fsync(file.fileno())
        seconds = time.monotonic() - began
        temporary = place / f".{node_id}"
        temporary.write_text(question.token, encoding="utf-8")
        temporary.rename(place / str(node_id))
    except OSError as error:
        return error.strerror or str(error), lock_error, None
    finally:
        with suppress(OSError):
            large.unlink()
    return "", lock_error, size / seconds if size == LARGE_BYTES else None


def _look_for(expected: set[int], place: Path, token: str) -> tuple[int, ...]:
    """Nodes of which the file is seen, soon or after a while: network file systems show it late."""
    seen: set[int] = set()
    end = time.monotonic() + SEE_SECONDS
    while True:
        seen |= {node_id for node_id in expected - seen if _read(place / str(node_id)) == token}
        if seen == expected or time.monotonic() > end:
            return tuple(sorted(seen))
        time.sleep(0.1)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _renames(place: Path, node_id: int, meeting: Meeting) -> tuple[int, int, str]:
    """The first node replaces a file again and again, the others read it: reads, faults, and the last fault."""
    file = place / CONTEST_FILE
    if node_id == 0:
        _replace(file, 0)
    meeting.wait_for_all("rename")
    end, number, faults, fault = time.monotonic() + RENAME_SECONDS, 0, 0, ""
    try:
        while time.monotonic() < end:
            number += 1
            if node_id == 0:
                _replace(file, number)
            else:
                said = _torn(file)
                faults, fault = faults + bool(said and said != STALE), said or fault
    except OSError as error:
        faults, fault = faults + 1, error.strerror or str(error)
    meeting.wait_for_all("renamed")
    if node_id == 0:
        file.unlink(missing_ok=True)
    return (0 if node_id == 0 else number), faults, fault


def _replace(file: Path, number: int) -> None:
    temporary = file.with_suffix(".new")
    temporary.write_bytes(b"%08d" % number * BLOCKS)
    temporary.rename(file)


STALE: Final = "stale handle"


def _torn(file: Path) -> str:
    """What a reader finds wrong: a file that is not there, or that is not of one piece."""
    try:
        found = file.read_bytes()
    except FileNotFoundError:
        return "no file was there"
    except OSError as error:
        if error.errno == errno.ESTALE:
            return STALE
        raise
    whole = len(found) == BLOCK_BYTES * BLOCKS and found == found[:BLOCK_BYTES] * BLOCKS
    return "" if whole else f"{len(found):,} bytes of {BLOCK_BYTES * BLOCKS:,}, or of two pieces"
