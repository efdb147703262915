"""left_out.json: steps of a run whose update is not made, so that whoever goes on leaves out the same ones.

With the steps, a run is again a pure function of its plan: step k changes the weights unless it is written here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from packhorse.durable import replace_file
from packhorse.errors import UserError

LEFT_OUT_FILE = "left_out.json"


def read_skipped_steps(run_folder: Path) -> dict[int, str]:
    """Step, counted from 1 as in metrics.jsonl, to why it is left out; empty where nothing is.

    Raises:
        UserError: The file is not what was written.
    """
    file = run_folder / LEFT_OUT_FILE
    if not file.is_file():
        return {}
    try:
        return {int(entry["step"]): str(entry["why"]) for entry in json.loads(file.read_text(encoding="utf-8"))}
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{file} cannot be read: {error}.",
            "it lists the steps whose update is not made; with others, the run would train another model.",
            "put the file back as it was, or train the recipe again under another name.",
        ) from error


def write_skipped_steps(run_folder: Path, left_out: Mapping[int, str]) -> None:
    """Replaces the file in one move, and waits until that is on disk."""
    entries = [{"step": step, "why": left_out[step]} for step in sorted(left_out)]
    replace_file(run_folder / LEFT_OUT_FILE, json.dumps(entries, indent=2) + "\n")
