"""List the checkpoints of a run, find the newest sound one, and remove those that are no longer kept."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from packhorse.run_folder.checkpoints.manifest import checkpoint_faults, read_manifest
from packhorse.run_folder.layout import (
    REMOVED_STEP_FOLDERS,
    STEP_FOLDER,
    STEP_FOLDERS,
    UNFINISHED_STEP_FOLDERS,
    first_free,
    removed_step_folder,
)


@dataclass(frozen=True)
class SoundCheckpoint:
    """The newest sound checkpoint, and why newer ones are not sound.

    Attributes:
        checkpoint: Folder of the checkpoint; None if no checkpoint is sound.
        passed_over: One sentence for each newer checkpoint.
    """

    checkpoint: Path | None
    passed_over: tuple[str, ...]


def step_of(checkpoint: Path) -> int:
    """Return the step in the name of a checkpoint."""
    match = STEP_FOLDER.fullmatch(checkpoint.name)
    assert match is not None, checkpoint
    return int(match[1])


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the folders with the name of a checkpoint, oldest first, complete or not; links are ignored."""
    named = [(match, path) for path in folder.glob(STEP_FOLDERS) if (match := STEP_FOLDER.fullmatch(path.name))]
    plain = [(int(match[1]), path) for match, path in named if path.is_dir() and not path.is_symlink()]
    return [path for _, path in sorted(plain)]


def complete_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints with a readable manifest, oldest first; their files are not read."""
    return [path for path in checkpoints_in(folder) if read_manifest(path) is not None]


def newest_complete(folder: Path) -> Path | None:
    """Return the newest checkpoint with a readable manifest, or None; its files are not read."""
    return next((path for path in reversed(checkpoints_in(folder)) if read_manifest(path) is not None), None)


def find_newest_sound(folder: Path) -> SoundCheckpoint:
    """Read all files of the newest checkpoint; if they differ from what was written, try the one before, and so on."""
    passed_over: list[str] = []
    for checkpoint in reversed(checkpoints_in(folder)):
        fault = next(checkpoint_faults(checkpoint), None)
        if fault is None:
            return SoundCheckpoint(checkpoint, tuple(passed_over))
        passed_over.append(fault)
    return SoundCheckpoint(None, tuple(passed_over))


def set_aside_newer(folder: Path, step: int) -> list[Path]:
    """Rename every checkpoint of a later step to `step-N.damaged-K`: no longer a checkpoint, kept to be examined."""
    renamed = []
    for checkpoint in checkpoints_in(folder):
        if step_of(checkpoint) > step:
            renamed.append(checkpoint.rename(first_free(folder, f"{checkpoint.name}.damaged-*")))
    return renamed


def superseded(checkpoints: Sequence[Path], keep_last: int, best: str | None) -> list[Path]:
    """Return the checkpoints, given oldest first, that are neither among the newest `keep_last` nor the best one."""
    return [path for path in checkpoints[: max(0, len(checkpoints) - keep_last)] if path.name != best]


def remove_checkpoint(checkpoint: Path) -> None:
    """Remove a checkpoint, its name first: a half removed folder must not look like a checkpoint."""
    renamed = removed_step_folder(checkpoint)
    shutil.rmtree(renamed, ignore_errors=True)
    checkpoint.rename(renamed)
    shutil.rmtree(renamed)


def remove_unfinished(folder: Path) -> None:
    """Remove what a killed process left half written or half removed. The caller makes sure that no process writes."""
    _remove_all(folder, UNFINISHED_STEP_FOLDERS)
    _remove_all(folder, REMOVED_STEP_FOLDERS)


def prune_checkpoints(folder: Path, keep_last: int, best: str | None) -> None:
    """Remove the complete checkpoints that are neither among the newest `keep_last` nor the best one.

    Raises:
        OSError: A checkpoint cannot be removed.
    """
    for checkpoint in superseded(complete_checkpoints(folder), keep_last, best):
        remove_checkpoint(checkpoint)
    _remove_all(folder, REMOVED_STEP_FOLDERS)


def _remove_all(folder: Path, pattern: str) -> None:
    for path in folder.glob(pattern):
        shutil.rmtree(path, ignore_errors=True)
