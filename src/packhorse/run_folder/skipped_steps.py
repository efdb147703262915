"""RUN/skipped_steps.json: steps whose update is skipped, so that a resumed run skips the same ones.

With this file a run is again a pure function of its plan: step k changes the weights unless it is listed here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from packhorse.durable import replace_file
from packhorse.errors import UserError
from packhorse.run_folder.layout import SKIPPED_STEPS_FILE, SKIPPED_STEPS_FILE_BEFORE


def read_skipped_steps(run_folder: Path) -> dict[int, str]:
    """Return the reason for each skipped step, counted from 1 as in metrics.jsonl; empty if there are none.

    Raises:
        UserError: The file is damaged.
    """
    file = run_folder / SKIPPED_STEPS_FILE
    file = file if file.is_file() else run_folder / SKIPPED_STEPS_FILE_BEFORE
    if not file.is_file():
        return {}
    try:
        return {int(entry["step"]): str(entry["why"]) for entry in json.loads(file.read_text(encoding="utf-8"))}
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{file} cannot be read: {error}.",
            "it lists the steps whose update is skipped; without it, the run would train another model.",
            "restore the file, or train the recipe again under another name.",
        ) from error


def write_skipped_steps(run_folder: Path, skipped_steps: Mapping[int, str]) -> None:
    """Replace the file with one rename, and wait until it is on disk."""
    entries = [{"step": step, "why": skipped_steps[step]} for step in sorted(skipped_steps)]
    replace_file(run_folder / SKIPPED_STEPS_FILE, json.dumps(entries, indent=2) + "\n")
