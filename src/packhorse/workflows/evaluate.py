"""Compare the model of a finished run with its base, and keep the result in the run folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from pyarrow import parquet

from packhorse.durable import replace_file
from packhorse.evaluate.ratings import with_ratings
from packhorse.evaluate.stored import StoredEvaluation, read_stored
from packhorse.plan.run_plan import RunPlan
from packhorse.run_folder.folder import relative
from packhorse.run_folder.layout import (
    EVALUATION_FILE,
    EVALUATION_FOLDER,
    RATINGS_FILE,
    ROWS_FILE,
    TEST_EVALUATION_FILE,
    TEST_ROWS_FILE,
)
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

    evaluation = compare_on_test(plan, again) if test else compare_on_held_out(plan)
    folder = Path(plan.run_folder)
    stored = StoredEvaluation(evaluation.comparison, _table(evaluation.rows))
    if not test:  # people rate the other rows
        stored = with_ratings(stored, ratings_file(folder), plan.recipe.evaluation)
    write_evaluation(stored, folder, test)
    return stored.comparison


def _table(rows: list[dict[str, Any]]) -> pa.Table:
    """Return one row per document; a column that some rows lack is null there."""
    columns = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: [row.get(name) for row in rows] for name in columns})


def write_evaluation(stored: StoredEvaluation, run_folder: Path, test: bool = False) -> None:
    """Write an evaluation into its run folder, the rows first."""
    file = rows_file(run_folder, test)
    file.parent.mkdir(exist_ok=True)
    beside = file.with_name(f".{file.name}")
    parquet.write_table(stored.table, beside)
    beside.replace(file)
    replace_file(result_file(run_folder, test), stored.comparison.model_dump_json(indent=2) + "\n")


def read_evaluation(run_folder: Path, test: bool = False) -> StoredEvaluation:
    """Return the evaluation of a run.

    Raises:
        UserError: There is none, a file is damaged, or no row was answered.
    """
    flags = ["--test"] if test else []
    return read_stored(result_file(run_folder, test), rows_file(run_folder, test), relative(run_folder), flags)


def rows_file(run_folder: Path, test: bool = False) -> Path:
    """Return the path of the values and answers by row."""
    return run_folder / EVALUATION_FOLDER / (TEST_ROWS_FILE if test else ROWS_FILE)


def ratings_file(run_folder: Path) -> Path:
    """Return the path of the ratings by people."""
    return run_folder / EVALUATION_FOLDER / RATINGS_FILE


def result_file(run_folder: Path, test: bool = False) -> Path:
    """Return the path of an evaluation's result."""
    return run_folder / (TEST_EVALUATION_FILE if test else EVALUATION_FILE)
