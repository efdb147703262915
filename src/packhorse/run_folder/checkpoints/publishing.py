"""Turn the files that the ranks have written into a checkpoint: a manifest, then one rename.

.step-000100.tmp/
    ...               files of all ranks, on disk and read back
    .written-R.json   rank R is done: names, sizes and sha256 of its files
step-000100/          without .written-R.json, and with a manifest
"""

from __future__ import annotations

import errno
import json
import time
from pathlib import Path
from typing import Final

from packhorse.durable import replace_file, sync_to_disk
from packhorse.errors import UserError
from packhorse.run_folder.checkpoints.listing import remove_checkpoint
from packhorse.run_folder.checkpoints.manifest import FileRecord, RunFacts, files_below, write_manifest
from packhorse.run_folder.layout import WRITTEN_LISTS, numbered, step_folder_name

SHARED_SECONDS: Final = 60.0
"""Longest time until a shared file system shows what another node has written (nfs(5): acdirmax)."""


def write_file_list(temporary: Path, rank: int, files: dict[str, FileRecord]) -> None:
    """Write that a rank is done, after its files are on disk.

    Raises:
        OSError: The disk refuses.
    """
    records = {name: record.model_dump() for name, record in files.items()}
    replace_file(temporary / numbered(WRITTEN_LISTS, rank), json.dumps(records) + "\n")


def publish_checkpoint(temporary: Path, run: RunFacts, shared_seconds: float = SHARED_SECONDS) -> Path:
    """Write the manifest from the file lists of all ranks and rename the folder. Only rank 0 calls it.

    Args:
        temporary: From `unfinished_step_folder`; every rank has written its file list there.
        run: Facts of the run; its world size is the number of file lists.
        shared_seconds: Longest wait for what another node has written.

    Returns:
        Folder of the checkpoint.

    Raises:
        UserError: Not all ranks write into this folder.
        OSError: The disk refuses, or a file is no longer as it was written.
    """
    files: dict[str, FileRecord] = {}
    _wait_for_file_lists(temporary, run.world_size, shared_seconds)
    for rank in range(run.world_size):
        file_list = temporary / numbered(WRITTEN_LISTS, rank)
        records = json.loads(file_list.read_text(encoding="utf-8"))
        files |= {name: FileRecord(**record) for name, record in records.items()}
        file_list.unlink()
    sizes = {path.relative_to(temporary).as_posix(): path.stat().st_size for path in files_below(temporary)}
    written_sizes = {name: record.bytes for name, record in files.items()}
    if sizes != written_sizes:
        changed = sorted(name for name in sizes | written_sizes if sizes.get(name) != written_sizes.get(name))
        raise OSError(errno.EIO, "not as it was written", str(temporary / changed[0]))
    write_manifest(temporary, run, files)
    target = temporary.with_name(step_folder_name(run.step))
    if target.exists():
        remove_checkpoint(target)  # an incomplete or damaged checkpoint of the same step
    temporary.rename(target)
    sync_to_disk(target.parent)
    return target


def not_shared_error(temporary: Path, num_seen: int, world_size: int) -> UserError:
    """Return the error for nodes that do not share the run folder."""
    run_folder = temporary.parent.parent
    return UserError(
        f"{run_folder} holds what {num_seen} of {world_size} processes have written of a checkpoint.",
        "all processes write into one run folder; if each node has its own, no folder has a whole checkpoint.",
        "set runs_folder to a folder that all nodes share.",
    )


def _wait_for_file_lists(temporary: Path, world_size: int, seconds: float) -> None:
    awaited = {temporary / numbered(WRITTEN_LISTS, rank) for rank in range(world_size)}
    deadline = time.monotonic() + seconds
    # Listed, not opened by name: a shared file system may remember that a name was absent.
    while missing := awaited.difference(temporary.iterdir()):
        if time.monotonic() >= deadline:
            raise not_shared_error(temporary, world_size - len(missing), world_size)
        time.sleep(min(0.5, seconds))
