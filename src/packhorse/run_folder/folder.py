"""The run folder: the single record of a run. Made whole or not at all; every later command takes just its name."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from packhorse.errors import UserError
from packhorse.plan.command import launch_argv
from packhorse.plan.replan import replace_plan
from packhorse.plan.run_plan import RunPlan, read_plan, write_plan
from packhorse.recipe.load import dump_recipe
from packhorse.run_folder.attempts import AttemptStart, write_attempt_start
from packhorse.run_folder.layout import PLAN_FILE
from packhorse.run_folder.status import State, Status, read_status, write_status

SWEEP_FILE: Final = "sweep.json"
"""Stands in the folder of a sweep, in place of a plan; `slurm/sweep_folder.py` writes it."""


def check_free(folder: Path) -> None:
    """Refuses a folder that holds a run already.

    Raises:
        UserError: It does, with what to do about it; or it is a link, so that the run would stand elsewhere.
    """
    if folder.is_symlink():
        raise UserError(
            f"{relative(folder)} is a link to {folder.readlink()}.",
            "a new run is made in its own folder below runs_folder, and nowhere else.",
            "remove the link, set runs_folder to where the run should stand, or give it another name.",
        )
    if not folder.exists():
        return
    status = read_status(folder) if (folder / PLAN_FILE).is_file() else None
    if status is not None and status.state == "failed" and not any((folder / "checkpoints").glob("step-*")):
        _set_aside(folder)
        return
    state = f"a run that is {status.state} at step {status.step} of {status.num_steps}" if status else "files"
    verbs = {"finished": "", "waiting": f"packhorse submit {relative(folder)}"}
    verb = verbs.get(status.state, f"packhorse resume {relative(folder)}") if status else ""
    resume = f"go on with `{verb}`, or " if verb else ""
    raise UserError(
        f"{relative(folder)} holds {state} already.",
        "a run folder is the record of one run and is never written over.",
        f"{resume}give this one another name, for example name={folder.name}-2.",
    )


def _set_aside(folder: Path) -> None:
    """A run that failed before its first checkpoint holds nothing to go on with: its name is free again."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}.failed-{number}")).exists():
        number += 1
    folder.rename(aside)


def create_run(plan: RunPlan, files: Mapping[str, str]) -> Path:
    """Makes the run folder with recipe.yaml, plan.json, status.json and the given files; all or nothing.

    Raises:
        UserError: The folder holds a run already, or cannot be written.
    """
    folder = Path(plan.run_folder)
    check_free(folder)
    draft = folder.with_name(f".{folder.name}.draft")
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        (draft / "recipe.yaml").write_text(dump_recipe(plan.recipe), encoding="utf-8")
        for name, text in files.items():
            (draft / name).write_text(text, encoding="utf-8")
        write_plan(plan, draft)
        write_status(draft, _new(plan))
        draft.rename(folder)
    except KeyboardInterrupt:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise UserError(
            f"{relative(folder)} cannot be written: {error.strerror}.",
            "the run folder keeps all that a run leaves.",
            "set runs_folder to a folder that you may write, with free space.",
        ) from error
    return folder


def complete_run(plan: RunPlan, files: Mapping[str, str]) -> None:
    """Gives a run that waited for its data the given files, and the plan that they are in; the run is then prepared.

    Raises:
        UserError: The folder cannot be written.
    """
    folder = Path(plan.run_folder)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    replace_plan(plan)
    write_status(folder, _new(plan))


def _new(plan: RunPlan) -> Status:
    state: State = "prepared" if plan.data is not None else "waiting"
    message = "" if plan.data is not None else "its data is not prepared yet"
    return Status(state=state, step=0, num_steps=plan.num_steps or 0, attempt=0, message=message)


def named_folder(name: str) -> Path:
    """The folder of a run or a sweep: its path, or its name below `runs`."""
    folder = Path(name)
    # A name of one part: what is typed as a path is read as that path only.
    if not folder.exists() and folder.parts == (folder.name,) and (Path("runs") / name).is_dir():
        folder = Path("runs") / name
    return folder


def open_run(name: str) -> RunPlan:
    """Reads the plan of a run given by its folder, or by its name below `runs`.

    Raises:
        UserError: There is no such run, or it is a sweep of many.
    """
    folder = named_folder(name)
    if (folder / SWEEP_FILE).is_file():
        raise UserError(
            f"{relative(folder)} is a sweep, not a run.",
            "each of its runs has a folder of its own; status, cancel and resume take them all.",
            f"name one of them, such as {relative(folder)}-1.",
        )
    plan = read_plan(folder)
    if Path(plan.run_folder) == folder.absolute():
        return plan
    # A run folder that was moved or copied is still the record of its run.
    moved = folder.absolute()
    return plan.model_copy(update={"run_folder": str(moved), "argv": launch_argv(plan.topology, moved)})


def next_attempt(folder: Path, begun: AttemptStart | None = None) -> tuple[int, Path]:
    """Number and log folder of the next attempt to run the plan; `begun`: what is known of it beside the time."""
    taken = [int(path.name.removeprefix("attempt-")) for path in (folder / "logs").glob("attempt-*")]
    number = max(taken, default=0) + 1
    logs = folder / "logs" / f"attempt-{number}"
    logs.mkdir(parents=True)
    write_attempt_start(logs, begun or AttemptStart(started_at=time.time()))
    return number, logs


def relative(path: str | Path) -> str:
    """A path as it would be typed here: relative to the current directory where it lies below."""
    return str(path).removeprefix(f"{Path.cwd()}/")
