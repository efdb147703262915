"""From the parts that the ranks have written to a checkpoint with a name.

.step-000100.tmp/
    ...               what each rank has written, on disk and read back
    .written-R.json   rank R is done: names, sizes and sha256 of its files
step-000100/          the same without these records, and with a manifest: one rename
"""

from __future__ import annotations

import errno
import json
import time
from pathlib import Path

from packhorse.durable import replace_file, sync_to_disk
from packhorse.errors import UserError
from packhorse.run_folder.checkpoints.listing import remove_checkpoint
from packhorse.run_folder.checkpoints.manifest import FileRecord, RunFacts, files_below, write_manifest
from packhorse.run_folder.layout import step_folder_name

SHARED_SECONDS = 60.0
"""How long a shared file system may take to show what another node has written (nfs(5): acdirmax)."""


def temporary_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is written below `folder`."""
    return folder / f".{step_folder_name(step)}.tmp"


def write_file_list(temporary: Path, rank: int, files: dict[str, FileRecord]) -> None:
    """Says that a rank is done, after its files are on disk.

    Raises:
        OSError: The disk refuses.
    """
    records = {name: record.model_dump() for name, record in files.items()}
    replace_file(_record(temporary, rank), json.dumps(records) + "\n")


def publish(temporary: Path, run: RunFacts, shared_seconds: float = SHARED_SECONDS) -> Path:
    """Writes the manifest from the records of all ranks and gives the folder its name; done by rank 0.

    Args:
        temporary: From `temporary_folder`; every rank has left its record there.
        run: Its world size says how many ranks write.
        shared_seconds: How long to wait for what another node has written.

    Returns:
        The checkpoint.

    Raises:
        UserError: Not all ranks write into this folder.
        OSError: The disk refuses, or a file is not there any more as it was written.
    """
    files: dict[str, FileRecord] = {}
    _wait_for_records(temporary, run.world_size, shared_seconds)
    for rank in range(run.world_size):
        records = json.loads(_record(temporary, rank).read_text(encoding="utf-8"))
        files |= {name: FileRecord(**record) for name, record in records.items()}
        _record(temporary, rank).unlink()
    present = {path.relative_to(temporary).as_posix(): path.stat().st_size for path in files_below(temporary)}
    if present != {name: record.bytes for name, record in files.items()}:
        odd = sorted(name for name in present.keys() | files.keys() if present.get(name) != _size(files.get(name)))
        raise OSError(errno.EIO, "not as it was written", str(temporary / odd[0]))
    write_manifest(temporary, run, files)
    target = temporary.with_name(step_folder_name(run.step))
    if target.exists():
        remove_checkpoint(target)  # of the same step, and not complete
    temporary.rename(target)
    sync_to_disk(target.parent)
    return target


def not_shared(temporary: Path, seen: int, world_size: int) -> UserError:
    """What a user reads whose nodes have a run folder each."""
    run_folder = temporary.parent.parent
    return UserError(
        f"{run_folder} holds what {seen} of {world_size} processes have written of a checkpoint.",
        "all processes write into one run folder; where each node has its own, none has a whole checkpoint.",
        "set runs_folder to a folder that all nodes share.",
    )


def _wait_for_records(temporary: Path, world_size: int, seconds: float) -> None:
    awaited = {_record(temporary, rank) for rank in range(world_size)}
    deadline = time.monotonic() + seconds
    # Listed, not asked for by name: a shared file system may remember that a name was absent.
    while missing := awaited.difference(temporary.iterdir()):
        if time.monotonic() >= deadline:
            raise not_shared(temporary, world_size - len(missing), world_size)
        time.sleep(min(0.5, seconds))


def _record(temporary: Path, rank: int) -> Path:
    return temporary / f".written-{rank}.json"


def _size(record: FileRecord | None) -> int | None:
    return None if record is None else record.bytes
