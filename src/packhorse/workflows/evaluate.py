"""Compare the model of a finished run with its base, and keep the result in the run folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from packhorse.plan.run_plan import RunPlan
from packhorse.run_folder.layout import EVALUATION_FILE, TEST_EVALUATION_FILE
from packhorse.workflows.prepared_data import require_data

if TYPE_CHECKING:
    from packhorse.evaluate.results import Comparison


def evaluate_run(plan: RunPlan, test: bool = False, again: bool = False) -> Comparison:
    """Compare base and tuned model on held-out rows; also write the result into the run folder.

    Args:
        plan: Plan of a finished run.
        test: Whether to measure the sealed test rows in place of validation and retain rows.
        again: Whether to open the test rows although they were opened before.

    Raises:
        UserError: The run has not finished, there are no such rows, or the test rows were opened before.
    """
    require_data(plan)
    # Only here: reading a result needs no torch.
    from packhorse.evaluate.evaluate_run import compare_on_held_out, compare_on_test

    comparison = compare_on_test(plan, again) if test else compare_on_held_out(plan)
    text = comparison.model_dump_json(indent=2) + "\n"
    result_file(Path(plan.run_folder), test).write_text(text, encoding="utf-8")
    return comparison


def result_file(run_folder: Path, test: bool = False) -> Path:
    """Return the path of an evaluation's result."""
    return run_folder / (TEST_EVALUATION_FILE if test else EVALUATION_FILE)
