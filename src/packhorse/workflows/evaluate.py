"""Compare the model of a finished run with its base, and keep the result in the run folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from pyarrow import parquet

from packhorse.durable import replace_file
from packhorse.errors import UserError
from packhorse.evaluate.ratings import with_ratings
from packhorse.evaluate.stored import StoredEvaluation, read_stored
from packhorse.launching.local.evaluation import launch_evaluation
from packhorse.plan.evaluation import evaluation_plan, evaluation_ranks
from packhorse.plan.run_plan import RunPlan
from packhorse.plan.topology import detect_hardware
from packhorse.run_folder.base_weights import require_base
from packhorse.run_folder.folder import named_folder, open_run, relative
from packhorse.run_folder.layout import (
    EVALUATION_FILE,
    EVALUATION_FOLDER,
    PLAN_FILE,
    RANKS_FOLDER,
    RATINGS_FILE,
    ROWS_FILE,
    TEST_EVALUATION_FILE,
    TEST_ROWS_FILE,
)
from packhorse.workflows.prepared_data import require_data

if TYPE_CHECKING:
    from packhorse.evaluate.distributed.over_ranks import Launcher
    from packhorse.evaluate.endpoint import EndpointClient
    from packhorse.evaluate.results import Comparison
    from packhorse.evaluate.tasks.compare_tasks import MeasuredTasks


@dataclass(frozen=True)
class EvaluationRequest:
    """How a run is evaluated.

    Attributes:
        test: Whether to measure the sealed test rows in place of validation and retain rows.
        again: Whether to open the test rows although they were opened before.
        ranks: Number of processes that measure; None for the rule of `plan.evaluation.evaluation_ranks`.
        endpoint: Answers in place of the tuned model's weights.
        base_endpoint: Answers in place of the base's weights.
        against: Run or folder of a model that the tuned model is compared with; empty or `base` for its base.
        tasks: Task file of lm-eval, or folder of them, to measure too.
    """

    test: bool = False
    again: bool = False
    ranks: int | None = None
    endpoint: EndpointClient | None = None
    base_endpoint: EndpointClient | None = None
    against: str = ""
    tasks: Path | None = None


def evaluate_run(
    plan: RunPlan, request: EvaluationRequest = EvaluationRequest(), report: Callable[[str], None] = lambda _: None
) -> Comparison:
    """Compare base and tuned model on held-out rows; also write the result into the run folder.

    Args:
        plan: Plan of a finished run.
        request: How the run is evaluated.
        report: Takes a line about the processes that measure.

    Raises:
        UserError: The run has not finished, there are no such rows, the test rows were opened before, a model cannot be
            measured, or a task file has a mistake.
    """
    _require_inputs(plan)
    # First what can fail: a mistake in a task file opens no test rows.
    of_tasks = None if request.tasks is None else _measure_tasks(plan, request.tasks)
    against = _against(request)
    # Only here: reading a result needs no torch.
    from packhorse.evaluate.evaluate_run import Means, compare_on_held_out, compare_on_test

    launcher = partial(launcher_of, request=request, report=report)
    means = Means(launcher, request.endpoint, request.base_endpoint, against)
    evaluation = compare_on_test(plan, request.again, means) if request.test else compare_on_held_out(plan, means)
    if of_tasks is not None:
        from packhorse.evaluate.tasks.compare_tasks import with_tasks

        evaluation = with_tasks(evaluation, of_tasks, plan.recipe.evaluation)
    folder, reference = Path(plan.run_folder), evaluation.comparison.reference if against is not None else ""
    stored = StoredEvaluation(evaluation.comparison, _table(evaluation.rows))
    if not request.test and not reference:  # people rate the other rows, beside the base
        stored = with_ratings(stored, ratings_file(folder), plan.recipe.evaluation)
    write_evaluation(stored, folder, request.test, reference)
    return stored.comparison


def _require_inputs(plan: RunPlan) -> None:
    """Raise UserError where data or base of a run are not what it was trained with."""
    require_data(plan)
    require_base(plan)


def _against(request: EvaluationRequest) -> RunPlan | Path | None:
    """Return the run or the folder that `--against` names."""
    if request.against in ("", "base"):
        return None
    folder = named_folder(request.against)
    if not (folder / PLAN_FILE).is_file():
        return folder.absolute()
    other = open_run(request.against)
    _require_inputs(other)
    return other


def launcher_of(plan: RunPlan, request: EvaluationRequest, report: Callable[[str], None]) -> Launcher | None:
    """Return what launches the ranks that measure a run's models; None where this process does.

    Args:
        plan: Plan of the run.
        request: How the run is evaluated.
        report: Takes a line about the processes.

    Raises:
        UserError: More processes are requested than this machine has devices.
    """
    from packhorse.evaluate.distributed.over_ranks import Launcher
    from packhorse.evaluate.evaluate_run import answers_file

    if request.endpoint is not None and request.base_endpoint is not None:
        return None
    machine = detect_hardware()
    ranks, reason = evaluation_ranks(plan, machine, request.ranks)
    if ranks == 1:
        return None
    folder = Path(plan.run_folder) / EVALUATION_FOLDER / RANKS_FOLDER
    launched = evaluation_plan(plan, ranks, machine, folder)
    report(f"measured by {ranks} processes under {launched.topology.engine}: {reason}")
    return Launcher(launched, launch_evaluation, answers_file(plan))


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


def _table(rows: list[dict[str, Any]]) -> pa.Table:
    """Return one row per document; a column that some rows lack is null there."""
    columns = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: [row.get(name) for row in rows] for name in columns})


def write_evaluation(stored: StoredEvaluation, run_folder: Path, test: bool = False, reference: str = "") -> None:
    """Write an evaluation into its run folder, the rows first."""
    file = rows_file(run_folder, test, reference)
    file.parent.mkdir(exist_ok=True)
    beside = file.with_name(f".{file.name}")
    parquet.write_table(stored.table, beside)
    beside.replace(file)
    replace_file(result_file(run_folder, test, reference), stored.comparison.model_dump_json(indent=2) + "\n")


def read_evaluation(run_folder: Path, test: bool = False) -> StoredEvaluation:
    """Return the evaluation of a run.

    Raises:
        UserError: There is none, a file is damaged, or no row was answered.
    """
    flags = ["--test"] if test else []
    return read_stored(result_file(run_folder, test), rows_file(run_folder, test), relative(run_folder), flags)


def rows_file(run_folder: Path, test: bool = False, reference: str = "") -> Path:
    """Return the path of the values and answers by row; `reference` is the name of a model in place of the base."""
    folder = run_folder / EVALUATION_FOLDER
    if reference:
        return folder / f"{_against_name(test, reference)}.parquet"
    return folder / (TEST_ROWS_FILE if test else ROWS_FILE)


def ratings_file(run_folder: Path) -> Path:
    """Return the path of the ratings by people."""
    return run_folder / EVALUATION_FOLDER / RATINGS_FILE


def result_file(run_folder: Path, test: bool = False, reference: str = "") -> Path:
    """Return the path of an evaluation's result; `reference` is the name of a model in place of the base."""
    if reference:
        return run_folder / EVALUATION_FOLDER / f"{_against_name(test, reference)}.json"
    return run_folder / (TEST_EVALUATION_FILE if test else EVALUATION_FILE)


def _against_name(test: bool, reference: str) -> str:
    return f"{'test-' * test}against-{reference}"
