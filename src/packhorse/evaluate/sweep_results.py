"""Result of `packhorse evaluate` on a sweep: what RUNS/NAME/sweep-evaluation.json holds. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from packhorse.evaluate.results import MetricResult
from packhorse.run_folder.layout import SWEEP_EVALUATION_FILE


class SweepLine(BaseModel):
    """One run of a sweep, or the folds of one combination of values as one."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    runs: tuple[str, ...]
    """Names of the runs: one, or one per fold."""
    overrides: tuple[str, ...]
    """Overrides without the fold."""
    result: MetricResult
    """Base and tuned model on all held-out rows; of folds pooled, each row by the run that did not train on it."""
    fold_mean: float | None = None
    """Mean over the folds of the tuned model's metric; None without folds."""
    fold_deviation: float | None = None
    """Standard deviation over the folds of the tuned model's metric."""
    against_best: MetricResult | None = None
    """This line (`tuned`) against the best one (`base`) on shared rows; None for the best and without shared rows."""
    problem: str = ""
    """Why there is no comparison with the best."""


class SweepEvaluation(BaseModel):
    """Runs of a sweep by one metric, the best first. All p values are adjusted together (Holm)."""

    model_config = ConfigDict(frozen=True)

    set: str
    lines: tuple[SweepLine, ...]
    left_out: dict[str, str]
    """Name of each run that is not in the table, and why."""

    @property
    def num_folds(self) -> int:
        """Return the number of folds; 1 without folds."""
        return len(self.lines[0].runs)


def read_sweep_evaluation(folder: Path) -> SweepEvaluation | None:
    """Return the evaluation of a sweep; None before the first.

    Raises:
        ValueError: The file is damaged.
    """
    file = folder / SWEEP_EVALUATION_FILE
    return SweepEvaluation.model_validate_json(file.read_text(encoding="utf-8")) if file.is_file() else None
