"""Compare the model of a finished run with its base, and keep the result in the run folder."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from pyarrow import parquet

from packhorse.durable import replace_file
from packhorse.errors import UserError
from packhorse.plan.run_plan import RunPlan
from packhorse.run_folder.layout import (
    EVALUATION_FILE,
    EVALUATION_FOLDER,
    ROWS_FILE,
    TEST_EVALUATION_FILE,
    TEST_ROWS_FILE,
)
from packhorse.workflows.prepared_data import require_data

if TYPE_CHECKING:
    from packhorse.evaluate.results import Comparison
    from packhorse.evaluate.tasks.compare_tasks import MeasuredTasks


def evaluate_run(plan: RunPlan, test: bool = False, again: bool = False, tasks: Path | None = None) -> Comparison:
    """Compare base and tuned model on held-out rows; also write the result into the run folder.

    Args:
        plan: Plan of a finished run.
        test: Whether to measure the sealed test rows in place of validation and retain rows.
        again: Whether to open the test rows although they were opened before.
        tasks: Task file of lm-eval, or folder of them, to measure too.

    Raises:
        UserError: The run has not finished, there are no such rows, the test rows were opened before, or a task file
            has a mistake.
    """
    require_data(plan)
    # First what can fail: a mistake in a task file opens no test rows.
    measured = None if tasks is None else _measure_tasks(plan, tasks)
    # Only here: reading a result needs no torch.
    from packhorse.evaluate.evaluate_run import compare_on_held_out, compare_on_test

    evaluation = compare_on_test(plan, again) if test else compare_on_held_out(plan)
    if measured is not None:
        from packhorse.evaluate.tasks.compare_tasks import with_tasks

        evaluation = with_tasks(evaluation, measured, plan.recipe.evaluation)
    text = evaluation.comparison.model_dump_json(indent=2) + "\n"
    _write_rows(evaluation.rows, rows_file(Path(plan.run_folder), test))
    replace_file(result_file(Path(plan.run_folder), test), text)
    return evaluation.comparison


def _measure_tasks(plan: RunPlan, path: Path) -> MeasuredTasks:
    if find_spec("lm_eval") is None:
        raise UserError(
            f"--tasks is {path}, and the package lm-eval is not installed.",
            "benchmark tasks are scored by lm-eval, an extra of packhorse.",
            "run `pip install 'packhorse[tasks]'`.",
        )
    from packhorse.evaluate.evaluate_run import subject_of
    from packhorse.evaluate.tasks.compare_tasks import measure_tasks
    from packhorse.evaluate.tasks.task_files import load_tasks

    subject, tokenizer = subject_of(plan)
    return measure_tasks(load_tasks(path), subject, tokenizer)


def _write_rows(rows: list[dict[str, Any]], file: Path) -> None:
    """Write one row per document; a column that some rows lack is null there."""
    columns = dict.fromkeys(name for row in rows for name in row)
    table = pa.table({name: [row.get(name) for row in rows] for name in columns})
    file.parent.mkdir(exist_ok=True)
    beside = file.with_name(f".{file.name}")
    parquet.write_table(table, beside)
    beside.replace(file)


def rows_file(run_folder: Path, test: bool = False) -> Path:
    """Return the path of the values and answers by row."""
    return run_folder / EVALUATION_FOLDER / (TEST_ROWS_FILE if test else ROWS_FILE)


def result_file(run_folder: Path, test: bool = False) -> Path:
    """Return the path of an evaluation's result."""
    return run_folder / (TEST_EVALUATION_FILE if test else EVALUATION_FILE)
