"""Compare runs: what differs between them, their final figures, and paired tests on rows that both answered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from packhorse.errors import UserError
from packhorse.evaluate.results import MetricResult
from packhorse.evaluate.shared_rows import SharedResult, compare_shared
from packhorse.evaluate.verdict import adjusted_results
from packhorse.plan.run_plan import RunPlan, leaves
from packhorse.run_folder.folder import open_run, relative
from packhorse.run_folder.layout import METRICS_FILE
from packhorse.run_folder.metrics import read_last
from packhorse.workflows.evaluate import rows_file
from packhorse.workflows.runs import RunSummary, summarise

NOT_COMPARED: Final = {"name", "runs_folder"}
"""Fields of the recipe that always differ."""


@dataclass(frozen=True)
class FieldDifference:
    """A field with different values, one per run; None: the run has no such field."""

    field: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class FinalFigures:
    """One run: its summary, and its last logged speed and memory."""

    summary: RunSummary
    tokens_per_second: float | None
    peak_bytes: float | None


@dataclass(frozen=True)
class PairedComparison:
    """A run against the first one on shared rows; without shared rows `problem` says why, and there are no results."""

    first: str
    second: str
    results: tuple[SharedResult, ...]
    problem: UserError | None = None


@dataclass(frozen=True)
class RunComparison:
    """Comparison of two runs or more; the first is the reference."""

    names: tuple[str, ...]
    differences: tuple[FieldDifference, ...]
    figures: tuple[FinalFigures, ...]
    paired: tuple[PairedComparison, ...]


def compare_runs(names: Sequence[str]) -> RunComparison:
    """Return the comparison of runs.

    Args:
        names: Run folders, or names of runs below `runs`.

    Raises:
        UserError: Fewer than two runs are named, or one cannot be opened.
    """
    if len(set(names)) < 2:
        raise UserError(
            f"{len(set(names))} run is named: {', '.join(names) or 'none'}.",
            "a comparison needs two different runs or more.",
            "name them, for example `packhorse compare runs/ONE runs/TWO`; `packhorse runs` lists them.",
        )
    plans = [open_run(name) for name in names]
    shown = tuple(relative(plan.run_folder) for plan in plans)
    return RunComparison(
        names=shown,
        differences=tuple(_differences(plans)),
        figures=tuple(_figures(Path(plan.run_folder)) for plan in plans),
        paired=tuple(_adjusted([_paired(plans[0], other, shown[0]) for other in plans[1:]])),
    )


def _differences(plans: Sequence[RunPlan]) -> list[FieldDifference]:
    """Return the fields of recipe, data, code and processes that differ; what follows from them is not compared."""
    fields = [_fields(plan) for plan in plans]
    names = dict.fromkeys(name for of_plan in fields for name in of_plan)
    found = [FieldDifference(name, tuple(of_plan.get(name) for of_plan in fields)) for name in names]
    return [each for each in found if any(value != each.values[0] for value in each.values)]


def _fields(plan: RunPlan) -> dict[str, Any]:
    recipe = {name: value for name, value in leaves(plan.recipe.model_dump(mode="json")) if name not in NOT_COMPARED}
    return recipe | {
        "data hash": plan.data.content_hash if plan.data is not None else None,
        "Packhorse version": plan.packhorse_version,
        "steps of the plan": plan.num_steps,
        **dict(leaves({"topology": plan.topology.model_dump(mode="json")})),
    }


def _figures(folder: Path) -> FinalFigures:
    speed, memory = "speed/tokens_per_second", "memory/peak_bytes"
    last = read_last(folder / METRICS_FILE, (speed, memory))
    return FinalFigures(summarise(folder), last.get(speed), last.get(memory))


def _paired(first: RunPlan, second: RunPlan, shown: str) -> PairedComparison:
    files = [rows_file(Path(plan.run_folder)) for plan in (first, second)]
    name = relative(second.run_folder)
    try:
        results = compare_shared(files[0], files[1], first.recipe.evaluation.smallest_effect)
    except UserError as error:
        return PairedComparison(shown, name, (), error)
    return PairedComparison(shown, name, tuple(results))


def _adjusted(comparisons: Sequence[PairedComparison]) -> list[PairedComparison]:
    """Return the comparisons with p adjusted for the number of all their lines, which are one table."""
    results = iter(adjusted_results([each.result for comparison in comparisons for each in comparison.results]))

    def with_p(each: SharedResult, result: MetricResult) -> SharedResult:
        return replace(each, result=result)

    return [
        replace(comparison, results=tuple(with_p(each, next(results)) for each in comparison.results))
        for comparison in comparisons
    ]
