"""The checkpoints of a run, in order: which are complete, which is the newest that is sound, which may go."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from packhorse.run_folder.checkpoints.manifest import checkpoint_faults, read_manifest

STEP_FOLDER = re.compile(r"step-(\d{6,})")
STEP_FOLDERS = "step-*"
REMOVED = f".{STEP_FOLDERS}.removed"


@dataclass(frozen=True)
class Found:
    """The newest sound checkpoint, and why newer ones were passed over.

    Attributes:
        checkpoint: Its folder; None where no checkpoint is sound.
        passed_over: A sentence for each newer one.
    """

    checkpoint: Path | None
    passed_over: tuple[str, ...]


def folder_name(step: int) -> str:
    """Name of a step's folder."""
    return f"step-{step:06d}"


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint's name says."""
    match = STEP_FOLDER.fullmatch(checkpoint.name)
    assert match is not None, checkpoint
    return int(match[1])


def checkpoints_in(folder: Path) -> list[Path]:
    """Folders with the name of a checkpoint, oldest first, complete or not; links are none."""
    named = [(match, path) for path in folder.glob(STEP_FOLDERS) if (match := STEP_FOLDER.fullmatch(path.name))]
    plain = [(int(match[1]), path) for match, path in named if path.is_dir() and not path.is_symlink()]
    return [path for _, path in sorted(plain)]


def complete_checkpoints(folder: Path) -> list[Path]:
    """Those whose manifest can be read, oldest first; their files are not read."""
    return [path for path in checkpoints_in(folder) if read_manifest(path) is not None]


def newest_complete(folder: Path) -> Path | None:
    """The newest of them, None where there is none; its files are not read."""
    return next((path for path in reversed(checkpoints_in(folder)) if read_manifest(path) is not None), None)


def find_newest_sound(folder: Path) -> Found:
    """Reads the newest checkpoint whole; where it is not as it was written, the one before, and so on."""
    passed_over: list[str] = []
    for checkpoint in reversed(checkpoints_in(folder)):
        fault = next(checkpoint_faults(checkpoint), None)
        if fault is None:
            return Found(checkpoint, tuple(passed_over))
        passed_over.append(fault)
    return Found(None, tuple(passed_over))


def set_aside_newer(folder: Path, step: int) -> list[Path]:
    """Renames every checkpoint of a later step to `step-N.damaged-K`: kept to be looked at, no longer a checkpoint."""
    aside = []
    for checkpoint in checkpoints_in(folder):
        if step_of(checkpoint) > step:
            number = 1
            while (target := checkpoint.with_name(f"{checkpoint.name}.damaged-{number}")).exists():
                number += 1
            checkpoint.rename(target)
            aside.append(target)
    return aside


def superseded(checkpoints: Sequence[Path], keep_last: int, best: str | None) -> list[Path]:
    """Of the complete checkpoints, oldest first, those that are neither among the newest nor the best."""
    return [path for path in checkpoints[: max(0, len(checkpoints) - keep_last)] if path.name != best]


def remove_checkpoint(checkpoint: Path) -> None:
    """Removes a checkpoint, its name first: what is half removed must not look like one."""
    nameless = checkpoint.with_name(f".{checkpoint.name}.removed")
    shutil.rmtree(nameless, ignore_errors=True)
    checkpoint.rename(nameless)
    shutil.rmtree(nameless)


def remove_unfinished(folder: Path) -> None:
    """Removes what a killed process left half written or half removed; nobody writes there now."""
    _remove_all(folder, f".{STEP_FOLDERS}.tmp")
    _remove_all(folder, REMOVED)


def prune(folder: Path, keep_last: int, best: str | None) -> None:
    """Removes the complete checkpoints that are neither among the newest nor the best.

    Raises:
        OSError: One cannot be removed.
    """
    for checkpoint in superseded(complete_checkpoints(folder), keep_last, best):
        remove_checkpoint(checkpoint)
    _remove_all(folder, REMOVED)


def _remove_all(folder: Path, pattern: str) -> None:
    for left in folder.glob(pattern):
        shutil.rmtree(left, ignore_errors=True)
