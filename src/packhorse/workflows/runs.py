"""All runs of a folder, each in one line; reads little of each run, imports no torch, and refuses no folder."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from packhorse.errors import UserError
from packhorse.evaluate.results import Comparison, Decision, MetricResult
from packhorse.plan.run_plan import read_plan
from packhorse.report.evaluation_words import headline_line
from packhorse.run_folder.attempts import read_attempts
from packhorse.run_folder.folder import relative
from packhorse.run_folder.layout import EVALUATION_FILE, JOBS_FILE, METRICS_FILE, PLAN_FILE, RECIPE_FILE, SWEEP_FILE
from packhorse.run_folder.metrics import read_last
from packhorse.run_folder.status import Status, read_status
from packhorse.run_folder.sweep import read_sweep
from packhorse.workflows.run_state import is_held, newest_heartbeats, ranks_live

TRAIN, VALIDATION, ELAPSED = "train/loss", "evaluation/loss", "time/elapsed_seconds"
NOT_STARTED: Final = "it is not started yet"
MISSING: Final = "its folder is missing"


@dataclass(frozen=True)
class EvaluationSummary:
    """Headline metric of an evaluation with its verdict, and the gate's decision if there is a gate."""

    set: str
    result: MetricResult
    decision: Decision | None


@dataclass(frozen=True)
class RunSummary:
    """One folder.

    Attributes:
        name: Name of the folder.
        kind: `run`; `broken`: a run that cannot be read; `other`: a folder that holds no run.
        problem: Why it is broken, or is no run.
        sweep: Name of its sweep; empty without one.
        overrides: Overrides of this run of the sweep.
        state: State of the run; `killed` if its status says that it trains and no process of it is alive.
        train_loss: Last logged loss; None before the first.
        validation_loss: Last loss on validation rows.
        evaluation: Result of `packhorse evaluate`; None without one.
        elapsed_seconds: Time of all attempts; None before the first step.
    """

    name: str
    kind: Literal["run", "broken", "other"]
    problem: str = ""
    sweep: str = ""
    overrides: tuple[str, ...] = ()
    state: str = ""
    step: int = 0
    num_steps: int = 0
    train_loss: float | None = None
    validation_loss: float | None = None
    evaluation: EvaluationSummary | None = None
    elapsed_seconds: float | None = None


def list_runs(folder: Path) -> list[RunSummary]:
    """Return the folders of a folder, hidden ones excepted, or the runs of a sweep; in a folder, sweeps stay together.

    Raises:
        UserError: The folder does not exist.
    """
    if not folder.is_dir():
        raise UserError(
            f"{folder} is not a folder.",
            "runs are folders inside the folder that `runs_folder` of a recipe names.",
            "name that folder, for example `packhorse runs runs`.",
        )
    if (folder / SWEEP_FILE).is_file():
        return list(_runs_of_sweep(folder.absolute()))
    folders = sorted(
        (path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")), key=_natural_order
    )
    in_sweeps: dict[Path, list[RunSummary]] = {}
    members: set[Path] = set()
    for path in folders:
        if (path / SWEEP_FILE).is_file():
            in_sweeps[path] = list(_runs_of_sweep(path))
            members |= {folder / summary.name for summary in in_sweeps[path] if summary.sweep}
    return [
        summary
        for path in folders
        if path not in members
        for summary in (in_sweeps[path] if path in in_sweeps else [summarise(path)])
    ]


def _natural_order(path: Path) -> list[tuple[int, str]]:
    """Return a key that sorts `run-10` after `run-9`."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.name)]


def _runs_of_sweep(path: Path) -> Iterator[RunSummary]:
    try:
        record = read_sweep(path)
    except (UserError, OSError, ValueError) as error:
        yield RunSummary(path.name, "broken", _first_line(error))
        return
    for member in record.runs:
        run = path.with_name(member.name)
        if not run.exists() and (path / RECIPE_FILE).is_file():  # a sweep of this machine, whose runs begin in turn
            yield RunSummary(run.name, "other", NOT_STARTED, path.name, member.overrides)
        else:
            yield summarise(run, path.name, member.overrides)


def summarise(path: Path, sweep: str = "", overrides: tuple[str, ...] = ()) -> RunSummary:
    """Return the summary of one folder.

    Args:
        path: The folder.
        sweep: Name of its sweep; empty without one.
        overrides: Overrides of this run of the sweep.
    """
    try:
        if not path.is_dir():
            return RunSummary(path.name, "broken", MISSING, sweep, overrides)
        if not (path / PLAN_FILE).is_file():
            return RunSummary(path.name, "other", f"it contains no {PLAN_FILE}", sweep, overrides)
        plan, status = read_plan(path), read_status(path)
        last = read_last(path / METRICS_FILE, (TRAIN, VALIDATION, ELAPSED))
        return RunSummary(
            name=path.name,
            kind="run",
            sweep=sweep,
            overrides=overrides,
            state=_state(path, status),
            step=status.step if status is not None else 0,
            num_steps=plan.num_steps or 0,
            train_loss=last.get(TRAIN),
            validation_loss=last.get(VALIDATION),
            evaluation=_evaluation(path / EVALUATION_FILE),
            elapsed_seconds=last.get(ELAPSED),
        )
    except (UserError, OSError, ValueError, KeyError) as error:
        return RunSummary(path.name, "broken", _first_line(error), sweep, overrides)


def _state(path: Path, status: Status | None) -> str:
    if status is None:
        return "not known"
    # Whether a job is alive, only Slurm knows: `packhorse status` asks it.
    if status.state not in ("starting", "training") or (path / JOBS_FILE).is_file():
        return status.state
    attempts = read_attempts(path)
    is_alive = ranks_live(path, attempts, newest_heartbeats(path, attempts)) or is_held(path)
    return status.state if is_alive else "killed"


def _evaluation(file: Path) -> EvaluationSummary | None:
    if not file.is_file():
        return None
    comparison = Comparison.model_validate_json(file.read_text(encoding="utf-8"))
    found = headline_line(comparison)
    return None if found is None else EvaluationSummary(found[0].set, found[1], comparison.decision)


def _first_line(error: Exception) -> str:
    fact = error.mistakes[0].fact if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return relative(fact.splitlines()[0])
