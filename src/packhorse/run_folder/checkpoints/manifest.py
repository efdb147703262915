"""manifest.json: what a checkpoint holds, written last. A folder without one, or that does not fit it, is none.

step-000100/
    model/ or adapter/  ...      every file, on disk (fsync)
    manifest.json                size and sha256 of each, and what the run was; on disk, then renamed to its name
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from packhorse.durable import forget_cached, replace_file, sync_to_disk

MANIFEST_FILE = "manifest.json"
MANIFEST_VERSION = 1
CHUNK_BYTES = 1 << 22


class Part(BaseModel):
    """A part of the manifest: immutable, and without room for a key that nobody reads."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class FileRecord(Part):
    """One file, by size and content."""

    bytes: int
    sha256: str


class RunFacts(Part):
    """What the run was when it was saved.

    Attributes:
        step: Optimizer steps done.
        engine: Engine that wrote the checkpoint.
        world_size: Number of processes that wrote it.
        plan: sha256 of RUN/plan.json.
        data: Content hash of the prepared data.
        wandb_id: Id of the W&B run, None where there is none.
    """

    step: int
    engine: str
    world_size: int
    plan: str
    data: str
    wandb_id: str | None = None


class CheckpointManifest(Part):
    """A checkpoint, file by file; paths are relative to its folder, with `/`."""

    version: int = MANIFEST_VERSION
    run: RunFacts
    files: dict[str, FileRecord]
    seal: str = ""
    """sha256 of the manifest itself, with this field empty."""

    def sealed(self) -> CheckpointManifest:
        """The same with its seal."""
        bare = self.model_copy(update={"seal": ""})
        return bare.model_copy(update={"seal": hashlib.sha256(bare.model_dump_json().encode()).hexdigest()})


def bring_to_disk(folder: Path, paths: Iterable[Path]) -> dict[str, FileRecord]:
    """Waits until each file below `folder` is on disk, and reads it back from there.

    Raises:
        OSError: The disk refuses, or gives back other bytes than were written.
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
    """Writes the manifest, after all that it names is on disk.

    Args:
        folder: Holds just these files.
        run: What the run is.
        files: From `bring_to_disk`.

    Raises:
        OSError: The manifest cannot be written; there is none then.
    """
    for inner in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
        sync_to_disk(inner)
    manifest = CheckpointManifest(run=run, files=dict(sorted(files.items()))).sealed()
    replace_file(folder / MANIFEST_FILE, manifest.model_dump_json(indent=1) + "\n")
    return manifest


def read_manifest(folder: Path) -> CheckpointManifest | None:
    """The manifest of a checkpoint; None where there is none, or it is not as it was written."""
    try:
        manifest = CheckpointManifest.model_validate_json((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
    except (OSError, ValidationError, UnicodeDecodeError):
        return None
    return manifest if manifest == manifest.sealed() else None


def checkpoint_faults(folder: Path) -> Iterator[str]:
    """What is wrong with a checkpoint, one sentence a file; nothing where it is as it was written.

    Sizes and names are looked at first, so that what is cut or missing is told before gigabytes are read.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        yield f"{folder.name} has no {MANIFEST_FILE} that can be read: it was not written to its end."
        return
    present = {path.relative_to(folder).as_posix(): path for path in files_below(folder)}
    sound = []
    for name, record in manifest.files.items():
        path = present.pop(name, None)
        if path is None:
            yield f"{folder.name}/{name} is missing."
        elif (size := path.stat().st_size) != record.bytes:
            yield f"{folder.name}/{name} has {size:,} bytes, and {record.bytes:,} were written."
        else:
            sound.append((name, path, record))
    for name in present:
        yield f"{folder.name}/{name} was not written by the run."
    for name, path, record in sound:
        if sha256_of(path) != record.sha256:
            yield f"{folder.name}/{name} has another content than was written (sha256)."


def files_below(folder: Path) -> list[Path]:
    """Every file below a folder but the manifest, sorted; a link counts as a file, and is never followed."""
    found = [Path(place) / name for place, _, names in os.walk(folder) for name in names]
    links = [path for path in folder.rglob("*") if path.is_symlink() and path.is_dir()]
    return sorted(path for path in (*found, *links) if path != folder / MANIFEST_FILE)


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a file's bytes; of a link, of where it points to, so that it can never fit."""
    if path.is_symlink():
        return f"link to {path.readlink()}"
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
