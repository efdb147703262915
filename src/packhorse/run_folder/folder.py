"""Create and open run folders. A run folder is the record of one run; later commands take only its name."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from packhorse.errors import UserError
from packhorse.plan.command import launch_argv
from packhorse.plan.replan import replace_plan
from packhorse.plan.run_plan import RunPlan, read_plan, write_plan
from packhorse.recipe.load import dump_recipe
from packhorse.run_folder.attempts import AttemptStart, write_attempt_start
from packhorse.run_folder.layout import (
    CHECKPOINTS_FOLDER,
    PLAN_FILE,
    RECIPE_FILE,
    RUNS_FOLDER,
    STEP_FOLDERS,
    SWEEP_FILE,
    attempt_logs,
    attempt_numbers,
    first_free,
)
from packhorse.run_folder.status import State, Status, read_status, write_status


def check_free(folder: Path) -> None:
    """Refuse a folder that holds a run already, but rename a run that failed before its first checkpoint.

    Raises:
        UserError: The folder holds a run or other files, or is a link.
    """
    if folder.is_symlink():
        raise UserError(
            f"{relative(folder)} is a link to {folder.readlink()}.",
            "a new run is created in a folder inside runs_folder, and nowhere else.",
            "remove the link, set runs_folder to the folder for the run, or choose another name.",
        )
    if not folder.exists():
        return
    status = read_status(folder) if (folder / PLAN_FILE).is_file() else None
    if status is not None and status.state == "failed" and not any((folder / CHECKPOINTS_FOLDER).glob(STEP_FOLDERS)):
        # Nothing to resume from: its name is available again.
        folder.rename(first_free(folder.parent, f"{folder.name}.failed-*"))
        return
    content = f"a run that is {status.state} at step {status.step} of {status.num_steps}" if status else "files"
    commands = {"finished": "", "waiting": f"packhorse submit {relative(folder)}"}
    command = commands.get(status.state, f"packhorse resume {relative(folder)}") if status else ""
    resume = f"resume it with `{command}`, or " if command else ""
    raise UserError(
        f"{relative(folder)} holds {content} already.",
        "a run folder is the record of one run and is never overwritten.",
        f"{resume}choose another name, for example name={folder.name}-2.",
    )


def create_run(plan: RunPlan, files: Mapping[str, str]) -> Path:
    """Create the run folder with recipe.yaml, plan.json, status.json and the given files.

    Raises:
        UserError: The folder holds a run already, or cannot be written.
    """

    def write(draft: Path) -> None:
        for name, text in {RECIPE_FILE: dump_recipe(plan.recipe), **files}.items():
            (draft / name).write_text(text, encoding="utf-8")
        write_plan(plan, draft)
        write_status(draft, _initial_status(plan))

    folder = Path(plan.run_folder)
    create_folder(folder, write, "the run folder holds everything that a run writes.")
    return folder


def create_folder(folder: Path, write: Callable[[Path], None], why: str) -> None:
    """Create a folder completely or not at all: `write` fills a draft, which is then renamed.

    Raises:
        UserError: The folder exists already, or cannot be written, with this `why`.
    """
    check_free(folder)
    draft = folder.with_name(f".{folder.name}.draft")
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        write(draft)
        draft.rename(folder)
    except OSError as error:
        raise UserError(
            f"{relative(folder)} cannot be written: {error.strerror}.",
            why,
            "set runs_folder to a folder that you may write, with free space.",
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)  # also after Ctrl-C


def complete_run(plan: RunPlan, files: Mapping[str, str]) -> None:
    """Write the plan and files of a run whose data has been prepared; its state becomes `prepared`.

    Raises:
        UserError: The folder cannot be written.
    """
    folder = Path(plan.run_folder)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    replace_plan(plan)
    write_status(folder, _initial_status(plan))


def _initial_status(plan: RunPlan) -> Status:
    state: State = "prepared" if plan.data is not None else "waiting"
    message = "" if plan.data is not None else "its data is not prepared yet"
    return Status(state=state, step=0, num_steps=plan.num_steps or 0, attempt=0, message=message)


def named_folder(name: str) -> Path:
    """Return the folder of a run or a sweep, given by its path or by its name in `runs`."""
    folder = Path(name)
    in_runs = Path(RUNS_FOLDER) / name
    # Only a bare name is looked up in `runs`; a path means that path.
    return in_runs if not folder.exists() and folder.parts == (folder.name,) and in_runs.is_dir() else folder


def open_run(name: str) -> RunPlan:
    """Read the plan of a run, given by its folder or by its name in `runs`.

    Raises:
        UserError: There is no such run, or it is a sweep.
    """
    folder = named_folder(name)
    if (folder / SWEEP_FILE).is_file():
        raise UserError(
            f"{relative(folder)} is a sweep, not a run.",
            "each run of a sweep has its own folder; only status, evaluate, cancel and resume take the whole sweep.",
            f"name one of them, such as {relative(folder)}-1.",
        )
    plan = read_plan(folder)
    if Path(plan.run_folder) == folder.absolute():
        return plan
    # A run folder that was moved or copied is still the record of its run.
    moved = folder.absolute()
    return plan.model_copy(update={"run_folder": str(moved), "argv": launch_argv(plan.topology, moved)})


def next_attempt(folder: Path, start: AttemptStart | None = None) -> tuple[int, Path]:
    """Create the log folder of the next attempt; return the attempt's number and this folder."""
    attempt = max(attempt_numbers(folder), default=0) + 1
    logs = attempt_logs(folder, attempt)
    logs.mkdir(parents=True)
    write_attempt_start(logs, start or AttemptStart(started_at=time.time()))
    return attempt, logs


def relative(path: str | Path) -> str:
    """Return a path as text, relative to the current directory if it is inside."""
    return str(path).removeprefix(f"{Path.cwd()}/")
