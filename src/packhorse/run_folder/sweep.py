"""RUNS/NAME of a sweep: which runs it has, RUNS/NAME-1 and so on, each an ordinary run folder."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from packhorse.errors import UserError
from packhorse.plan.run_plan import PlanPart
from packhorse.recipe.sweep import SweepRun
from packhorse.run_folder.folder import check_free, named_folder, relative
from packhorse.run_folder.layout import SWEEP_FILE

SWEEP_VERSION: Final = 1


class SweepMember(PlanPart):
    """One run of a sweep."""

    number: int
    """Counted from 1; also that of its task in the job array."""
    overrides: tuple[str, ...]
    """What sets it apart, as it would be typed."""


class SweepRecord(PlanPart):
    """A sweep as it was submitted."""

    version: int = SWEEP_VERSION
    recipe: str
    """The recipe as it was typed."""
    runs: tuple[SweepMember, ...]


def member_folder(sweep_folder: Path, number: int) -> Path:
    """The run folder of one run of a sweep; the job script makes the same of its task's number."""
    return sweep_folder.with_name(f"{sweep_folder.name}-{number}")


def create_sweep(folder: Path, recipe: str, runs: Sequence[SweepRun]) -> SweepRecord:
    """Makes the folder with sweep.json and an empty logs folder; all or nothing.

    Raises:
        UserError: There is something already, or it cannot be written.
    """
    check_free(folder)
    members = tuple(SweepMember(number=run.number, overrides=run.overrides) for run in runs)
    record = SweepRecord(recipe=recipe, runs=members)
    draft = folder.with_name(f".{folder.name}.draft")
    try:
        shutil.rmtree(draft, ignore_errors=True)
        (draft / "logs").mkdir(parents=True)
        (draft / SWEEP_FILE).write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
        draft.rename(folder)
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise UserError(
            f"{relative(folder)} cannot be written: {error.strerror}.",
            "the folder of a sweep says which runs it has.",
            "set runs_folder to a folder that you may write, with free space.",
        ) from error
    return record


def find_sweep(name: str) -> Path | None:
    """The absolute folder of a sweep given by its path, or by its name below `runs`; None where it is none."""
    folder = named_folder(name)
    return folder.absolute() if (folder / SWEEP_FILE).is_file() else None


def read_sweep(folder: Path) -> SweepRecord:
    """Which runs a sweep has.

    Raises:
        UserError: The file is not what was written.
    """
    file = folder / SWEEP_FILE
    try:
        return SweepRecord.model_validate_json(file.read_text(encoding="utf-8"))
    except ValidationError as error:
        raise UserError(
            f"{relative(file)} cannot be read as a sweep of version {SWEEP_VERSION}.",
            f"its form does not fit: {str(error).splitlines()[0]}",
            "use the Packhorse version that submitted it; each of its runs stands on its own beside it.",
        ) from error
