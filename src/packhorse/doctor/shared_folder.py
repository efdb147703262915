"""Test a folder by using it: is it shared, is a rename atomic for readers, and can it be written?"""

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

from packhorse.doctor.facts import DoctorRequest, FolderFacts
from packhorse.doctor.machine import file_system
from packhorse.doctor.rendezvous import Rendezvous
from packhorse.run_folder.layout import PLAN_FILE

REQUEST_FILE: Final = "start"
RENAMED_FILE: Final = "renamed"
SEE_SECONDS: Final = 5.0
RENAME_SECONDS: Final = 1.0
BLOCK_BYTES: Final = 8
NUM_BLOCKS: Final = 8192
SMALL_BYTES: Final = 2**20
LARGE_BYTES: Final = 32 * 2**20
STALE: Final = "stale handle"


def check_folder_of(request: DoctorRequest) -> Path:
    """Return the folder for this request's files: a new name, which no network file system has cached as absent."""
    return Path(request.folder) / f".packhorse-doctor-{request.token}"


def create_check_folder(request: DoctorRequest) -> Path:
    """Create the folder for this request's files, with one file that every node must see.

    Raises:
        OSError: It cannot be written.
    """
    folder = check_folder_of(request)
    folder.mkdir()
    (folder / REQUEST_FILE).write_text(request.token, encoding="utf-8")
    return folder


def check_shared_folder(node_id: int, request: DoctorRequest, rendezvous: Rendezvous) -> FolderFacts:
    """Write a file, read those of the nodes in the rendezvous, and remove the file again."""
    folder, check_folder = Path(request.folder), check_folder_of(request)
    facts = {
        "exists": folder.is_dir(),
        "kind": file_system(folder),
        "plan_sha256": _wait_for_plan(folder, request.plan_sha256),
    }
    facts["sees_request_file"] = _read(check_folder / REQUEST_FILE) == request.token
    write_error, lock_error, speed = _write(check_folder, node_id, request)
    # No node looks for a file before it exists: NFS caches its absence for half a minute.
    rendezvous.wait_for_all("written")
    expected = set(rendezvous.members) - ({node_id} if write_error else set())
    sees_nodes = _look_for_files(expected, check_folder, request.token)
    renames: tuple[int, int, str] = (0, 0, "")
    if not request.fast and request.num_nodes > 1:
        renames = _test_renames(check_folder, node_id, rendezvous)
    rendezvous.wait_for_all("folder")
    with suppress(OSError):
        (check_folder / str(node_id)).unlink()
        check_folder.rmdir()  # fails while other nodes use it; the requester removes it then
    return FolderFacts(
        **facts,
        sees_nodes=sees_nodes,
        write_error=write_error,
        lock_error=lock_error,
        write_bytes_per_second=speed,
        free_bytes=shutil.disk_usage(folder).free if folder.is_dir() else 0,
        rename_reads=renames[0],
        rename_faults=renames[1],
        rename_fault=renames[2],
    )


def plan_sha256(folder: Path) -> str:
    """Return the hash of the plan that this node sees; empty if it sees none."""
    try:
        return hashlib.sha256((folder / PLAN_FILE).read_bytes()).hexdigest()
    except OSError:
        return ""


def _wait_for_plan(folder: Path, expected: str) -> str:
    """Return the hash of the plan, soon after it is the expected one: an NFS client may cache the previous file."""
    end = time.monotonic() + (SEE_SECONDS if expected else 0.0)
    while (found := plan_sha256(folder)) != expected and time.monotonic() < end:
        time.sleep(0.2)
    return found


def _write(folder: Path, node_id: int, request: DoctorRequest) -> tuple[str, str, float | None]:
    """Write this node's file, after a large one that detects a quota; return both errors, and bytes/s."""
    size = LARGE_BYTES if node_id == 0 and not request.fast else SMALL_BYTES
    large = folder / f"{node_id}.large"
    lock_error, began = "", time.monotonic()
    try:
        folder.mkdir(parents=True, exist_ok=True)
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
        temporary = folder / f".{node_id}"
        temporary.write_text(request.token, encoding="utf-8")
        temporary.rename(folder / str(node_id))
    except OSError as error:
        return error.strerror or str(error), lock_error, None
    finally:
        with suppress(OSError):
            large.unlink()
    return "", lock_error, size / seconds if size == LARGE_BYTES else None


def _look_for_files(expected: set[int], folder: Path, token: str) -> tuple[int, ...]:
    """Return the nodes whose file is visible, at once or after some seconds: network file systems are slow to show."""
    seen: set[int] = set()
    end = time.monotonic() + SEE_SECONDS
    while True:
        seen |= {node_id for node_id in expected - seen if _read(folder / str(node_id)) == token}
        if seen == expected or time.monotonic() > end:
            return tuple(sorted(seen))
        time.sleep(0.1)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _test_renames(folder: Path, node_id: int, rendezvous: Rendezvous) -> tuple[int, int, str]:
    """Replace a file repeatedly on the first node while the others read it; return reads, faults and the last fault."""
    file = folder / RENAMED_FILE
    if node_id == 0:
        _replace(file, 0)
    rendezvous.wait_for_all("rename")
    end, number, faults, last_fault = time.monotonic() + RENAME_SECONDS, 0, 0, ""
    try:
        while time.monotonic() < end:
            number += 1
            if node_id == 0:
                _replace(file, number)
            else:
                fault = _fault_of_read(file)
                faults, last_fault = faults + bool(fault and fault != STALE), fault or last_fault
    except OSError as error:
        faults, last_fault = faults + 1, error.strerror or str(error)
    rendezvous.wait_for_all("renamed")
    if node_id == 0:
        file.unlink(missing_ok=True)
    return (0 if node_id == 0 else number), faults, last_fault


def _replace(file: Path, number: int) -> None:
    temporary = file.with_suffix(".new")
    temporary.write_bytes(b"%08d" % number * NUM_BLOCKS)
    temporary.rename(file)


def _fault_of_read(file: Path) -> str:
    """Read the file; return what is wrong: it is absent, or a mix of two versions."""
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return "the file was absent"
    except OSError as error:
        if error.errno == errno.ESTALE:
            return STALE
        raise
    is_whole = len(content) == BLOCK_BYTES * NUM_BLOCKS and content == content[:BLOCK_BYTES] * NUM_BLOCKS
    return "" if is_whole else f"{len(content):,} bytes of {BLOCK_BYTES * NUM_BLOCKS:,}, or parts of two versions"
