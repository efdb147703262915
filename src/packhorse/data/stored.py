"""Is prepared data as it was written? Sizes are looked at before each run, contents by `packhorse verify`."""

from __future__ import annotations

import hashlib
from pathlib import Path

from packhorse.data.manifest import MANIFEST_FILE, DataManifest, FileRecord
from packhorse.errors import UserError


def recorded_files(manifest: DataManifest) -> dict[str, FileRecord]:
    """Every file that was written, by path below the folder; empty where an earlier version kept no record."""
    in_splits = {
        f"{split}/{name}": file for split, counts in manifest.splits.items() for name, file in counts.files.items()
    }
    return {**in_splits, **manifest.files}


def size_faults(folder: Path, manifest: DataManifest) -> dict[str, str]:
    """What is missing or has another size, a sentence for each file; looks at the folder only, not into files."""
    faults = {}
    for name, record in recorded_files(manifest).items():
        path = folder / name
        if not path.is_file():
            faults[name] = f"{name} is missing."
        elif (size := path.stat().st_size) != record.bytes:
            faults[name] = f"{name} has {size:,} bytes, and {record.bytes:,} were written."
    return faults


def content_faults(folder: Path, manifest: DataManifest) -> dict[str, str]:
    """As `size_faults`, and what has another content (sha256); reads every file whole."""
    faults = size_faults(folder, manifest)
    for name, record in recorded_files(manifest).items():
        if name in faults:
            continue
        with (folder / name).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != record.sha256:
                faults[name] = f"{name} has another content than was written (sha256)."
    return faults


def require_sizes(folder: Path, manifest: DataManifest) -> None:
    """Refuses prepared data that is not whole, before a device is taken.

    Raises:
        UserError: A file is missing or has another size.
    """
    faults = size_faults(folder, manifest)
    if not faults:
        return
    raise UserError(
        f"the prepared data in {folder} is damaged: {next(iter(faults.values()))}",
        f"{MANIFEST_FILE} says what was written, and other rows would be trained on than those.",
        f"remove {folder}, and prepare it again: packhorse prepare RECIPE makes the same packs of the same rows.",
    )
