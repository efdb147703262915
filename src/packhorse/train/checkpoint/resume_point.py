"""Finds the checkpoint that a run resumes from."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from packhorse.errors import UserError
from packhorse.run_folder.checkpoints.listing import (
    SoundCheckpoint,
    find_newest_sound,
    newest_complete,
    remove_unfinished,
    set_aside_newer,
    step_of,
)
from packhorse.run_folder.layout import CHECKPOINTS_FOLDER, STATE_FILE, step_folder_name
from packhorse.train.engine.process_group import from_rank_0
from packhorse.train.state import TrainState

# Sent by rank 0 instead of a step where there is none to resume from.
NONE_WRITTEN, NONE_IS_SOUND = -1, -2


def checkpoint_to_resume(run_folder: Path, is_main: bool) -> tuple[Path | None, TrainState]:
    """Return the newest undamaged checkpoint and its state; a fresh state where the run has none.

    A collective: only rank 0 checks the files, because the ranks of a node would all read the same bytes. Damaged
    checkpoints are renamed, so that their step can be written again.

    Raises:
        UserError: There are checkpoints, and none of them is sound.
    """
    folder = run_folder / CHECKPOINTS_FOLDER
    if is_main:
        remove_unfinished(folder)
    found = find_newest_sound(folder) if is_main else SoundCheckpoint(None, ())
    for fault in found.passed_over:
        sys.stderr.write(f"passed over: {fault}\n")
    step = from_rank_0(_step_or_code(found))
    if step == NONE_IS_SOUND:
        raise UserError(
            f"no checkpoint of {run_folder.name} can be read: {next(iter(found.passed_over), 'see rank 0')}",
            "resuming from a damaged checkpoint would train another model, and starting at step 0 is your choice.",
            f"inspect them with `packhorse verify {run_folder}`; to start again, remove {folder}.",
        )
    if is_main:
        set_aside_newer(folder, step)
    if step == NONE_WRITTEN:
        return None, TrainState()
    checkpoint = folder / step_folder_name(step)
    return checkpoint, read_state(checkpoint)


def _step_or_code(found: SoundCheckpoint) -> int:
    if found.checkpoint is not None:
        return step_of(found.checkpoint)
    return NONE_IS_SOUND if found.passed_over else NONE_WRITTEN


def newest_state(run_folder: Path) -> TrainState:
    """Return the state of the newest complete checkpoint to show the run's progress; other files are not read."""
    newest = newest_complete(run_folder / CHECKPOINTS_FOLDER)
    return read_state(newest) if newest else TrainState()


def read_state(checkpoint: Path) -> TrainState:
    """Return the counters stored with a checkpoint."""
    record = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    return TrainState.of(record)
