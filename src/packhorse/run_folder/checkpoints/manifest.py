"""manifest.json: the files of a checkpoint with size and sha256, and facts of the run.

The manifest is written last, after every file is on disk (fsync). A folder without a manifest, or with other files than
it lists, is not a checkpoint.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from packhorse.durable import forget_cached, replace_file, sync_to_disk
from packhorse.plan.run_plan import PlanPart
from packhorse.run_folder.layout import MANIFEST_FILE

MANIFEST_VERSION: Final = 1
CHUNK_BYTES: Final = 1 << 22


class FileRecord(PlanPart):
    """Size and content of one file."""

    bytes: int
    sha256: str


class RunFacts(PlanPart):
    """Facts of the run when the checkpoint was written.

    Attributes:
        step: Optimizer steps done.
        engine: Engine that wrote the checkpoint.
        world_size: Number of processes that wrote it.
        plan: sha256 of RUN/plan.json.
        data: Content hash of the prepared data.
        wandb_id: Id of the W&B run; None without W&B.
    """

    step: int
    engine: str
    world_size: int
    plan: str
    data: str
    wandb_id: str | None = None


class CheckpointManifest(PlanPart):
    """Content of a checkpoint; paths are relative to its folder, with `/`."""

    version: int = MANIFEST_VERSION
    run: RunFacts
    files: dict[str, FileRecord]
    seal: str = ""
    """sha256 of the manifest with this field empty."""

    def sealed(self) -> CheckpointManifest:
        """Return a copy with its seal."""
        bare = self.model_copy(update={"seal": ""})
        return bare.model_copy(update={"seal": hashlib.sha256(bare.model_dump_json().encode()).hexdigest()})


def bring_to_disk(folder: Path, paths: Iterable[Path]) -> dict[str, FileRecord]:
    """Wait until each file below `folder` is on disk, and read it back from there.

    Raises:
        OSError: The disk refuses, or returns other bytes than were written.
    """
    return {path.relative_to(folder).as_posix(): _on_disk(path) for path in paths}


def _on_disk(path: Path) -> FileRecord:
    written = sha256_of(path)
    sync_to_disk(path)
    forget_cached(path)
    if sha256_of(path) != written:
        raise OSError(errno.EIO, "other bytes are read back than were written", str(path))
    return FileRecord(bytes=path.stat().st_size, sha256=written)


def write_manifest(folder: Path, run: RunFacts, files: Mapping[str, FileRecord]) -> CheckpointManifest:
    """Write the manifest, after all its files are on disk.

    Args:
        folder: Folder with exactly these files.
        run: Facts of the run.
        files: From `bring_to_disk`.

    Raises:
        OSError: The manifest cannot be written; the folder then has none.
    """
    for inner in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
        sync_to_disk(inner)
    manifest = CheckpointManifest(run=run, files=dict(sorted(files.items()))).sealed()
    replace_file(folder / MANIFEST_FILE, manifest.model_dump_json(indent=1) + "\n")
    return manifest


def read_manifest(folder: Path) -> CheckpointManifest | None:
    """Return the manifest of a checkpoint; None if it is missing or damaged."""
    try:
        manifest = CheckpointManifest.model_validate_json((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
    except (OSError, ValidationError, UnicodeDecodeError):
        return None
    return manifest if manifest == manifest.sealed() else None


def checkpoint_faults(folder: Path, part: str = "") -> Iterator[str]:
    """Yield one sentence per damaged file of a checkpoint, or of its folder `part`; nothing if all are as written.

    Names and sizes come first, so that truncated and missing files are reported before gigabytes are read.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        yield f"{folder.name} has no {MANIFEST_FILE} that can be read: it is incomplete."
        return
    present = {path.relative_to(folder).as_posix(): path for path in files_below(folder / part)}
    same_size = []
    for name, record in manifest.files.items():
        if not name.startswith(part):
            continue
        path = present.pop(name, None)
        if path is None:
            yield f"{folder.name}/{name} is missing."
        elif (size := path.stat().st_size) != record.bytes:
            yield f"{folder.name}/{name} has {size:,} bytes, and {record.bytes:,} were written."
        else:
            same_size.append((name, path, record))
    for name in present:
        yield f"{folder.name}/{name} was not written by the run."
    for name, path, record in same_size:
        if sha256_of(path) != record.sha256:
            yield f"{folder.name}/{name} has other content than was written (sha256)."


def files_below(folder: Path) -> list[Path]:
    """Return every file below a folder except the manifest, sorted; a link counts as a file, and is never followed."""
    files = [Path(parent) / name for parent, _, names in os.walk(folder) for name in names]
    links = [path for path in folder.rglob("*") if path.is_symlink() and path.is_dir()]
    return sorted(path for path in (*files, *links) if path != folder / MANIFEST_FILE)


def sha256_of(path: Path) -> str:
    """Return the hexadecimal sha256 of a file; for a link, text that never equals a sha256."""
    if path.is_symlink():
        return f"link to {path.readlink()}"
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
