"""RUNS/NAME/sweep.json: the runs of a sweep. Each is an ordinary run folder beside it, RUNS/NAME-1 and so on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from packhorse.errors import UserError
from packhorse.plan.run_plan import PlanPart
from packhorse.recipe.sweep import SweepRun
from packhorse.run_folder.folder import create_folder, named_folder, relative
from packhorse.run_folder.layout import LOGS_FOLDER, SWEEP_FILE

SWEEP_VERSION: Final = 2


class SweepMember(PlanPart):
    """One run of a sweep."""

    name: str
    """Name of the run."""
    number: int
    """Number of the run and of its task in the job array, counted from 1."""
    overrides: tuple[str, ...]
    """Overrides of this run, as typed on a command line."""


class SweepRecord(PlanPart):
    """A sweep as it was started."""

    version: int = SWEEP_VERSION
    recipe: str
    """The recipe as it was typed."""
    runs: tuple[SweepMember, ...]


def member_folders(sweep_folder: Path) -> list[Path]:
    """Return the run folder of each run of a sweep, in the order of their numbers.

    Raises:
        UserError: The record of the sweep is damaged.
    """
    return [sweep_folder.with_name(member.name) for member in read_sweep(sweep_folder).runs]


def create_sweep(folder: Path, recipe: str, runs: Sequence[SweepRun], files: Mapping[str, str] = {}) -> SweepRecord:
    """Create the folder with sweep.json, an empty logs folder and the given files.

    Raises:
        UserError: The folder exists already, or cannot be written.
    """
    members = tuple(SweepMember(name=run.recipe.name, number=run.number, overrides=run.overrides) for run in runs)
    record = SweepRecord(recipe=recipe, runs=members)

    def write(draft: Path) -> None:
        (draft / LOGS_FOLDER).mkdir()
        for name, text in {SWEEP_FILE: record.model_dump_json(indent=2) + "\n", **files}.items():
            (draft / name).write_text(text, encoding="utf-8")

    create_folder(folder, write, "the folder of a sweep lists its runs.")
    return record


def find_sweep(name: str) -> Path | None:
    """Return the absolute folder of a sweep, given by its path or by its name in `runs`; None if it is no sweep."""
    folder = named_folder(name)
    return folder.absolute() if (folder / SWEEP_FILE).is_file() else None


def read_sweep(folder: Path) -> SweepRecord:
    """Return the record of a sweep.

    Raises:
        UserError: The file is damaged, or another version of Packhorse wrote it.
    """
    file = folder / SWEEP_FILE
    try:
        return SweepRecord.model_validate_json(file.read_text(encoding="utf-8"))
    except ValidationError as error:
        raise UserError(
            f"{relative(file)} cannot be read as a sweep of version {SWEEP_VERSION}.",
            f"its form does not fit: {str(error).splitlines()[0]}",
            "use the Packhorse version that submitted the sweep; each of its runs can be used on its own.",
        ) from error
