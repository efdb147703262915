"""Where the time of a run's steps went, from the trace that `track.profile` wrote."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from packhorse.errors import UserError
from packhorse.plan.run_plan import RunPlan
from packhorse.report.step_time import StepTime, read_trace, step_time
from packhorse.run_folder.folder import relative
from packhorse.run_folder.layout import PROFILE_FOLDER, TRACE


def profile_run(plan: RunPlan, rank: int) -> tuple[Path, StepTime]:
    """Return the newest trace of a rank, and where its time went.

    Raises:
        UserError: There is no trace of the rank, or it cannot be read.
    """
    folder = Path(plan.run_folder) / PROFILE_FOLDER
    ranks = {path: int(found[3]) for path in folder.glob("*") if (found := TRACE.fullmatch(path.name))}
    traces = sorted((path for path in ranks if ranks[path] == rank), key=lambda path: path.stat().st_mtime)
    if not traces:
        raise UserError(
            f"{relative(plan.run_folder)} holds no trace of rank {rank}"
            + (f"; {relative(folder)} has those of ranks {_listed(ranks.values())}." if ranks else "."),
            "a rank records its time only in the steps that the recipe names.",
            f"name one of these with --rank {min(ranks.values())}."
            if ranks
            else "train some steps with `packhorse train RECIPE name=NEW 'track.profile={steps: [10, 13]}'`.",
        )
    times = step_time(read_trace(traces[-1]))
    if times is None:
        raise UserError(
            f"{relative(traces[-1])} holds no step.",
            "the trace of a run has a mark for each step.",
            f"remove the file with `rm {relative(traces[-1])}`, and repeat the run with track.profile.",
        )
    return traces[-1], times


def _listed(ranks: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(set(ranks))))
