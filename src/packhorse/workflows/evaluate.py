"""Compare the model of a finished run with its base, and keep the result in the run folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from pyarrow import parquet

from packhorse.durable import replace_file
from packhorse.launching.local.evaluation import launch_evaluation
from packhorse.plan.evaluation import evaluation_plan, evaluation_ranks
from packhorse.plan.run_plan import RunPlan
from packhorse.plan.topology import detect_hardware
from packhorse.run_folder.base_weights import require_base
from packhorse.run_folder.folder import named_folder, open_run
from packhorse.run_folder.layout import (
    EVALUATION_FILE,
    EVALUATION_FOLDER,
    PLAN_FILE,
    RANKS_FOLDER,
    ROWS_FILE,
    TEST_EVALUATION_FILE,
    TEST_ROWS_FILE,
)
from packhorse.workflows.prepared_data import require_data

if TYPE_CHECKING:
    from packhorse.evaluate.distributed.over_ranks import Launcher
    from packhorse.evaluate.endpoint import EndpointClient
    from packhorse.evaluate.results import Comparison


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
    """

    test: bool = False
    again: bool = False
    ranks: int | None = None
    endpoint: EndpointClient | None = None
    base_endpoint: EndpointClient | None = None
    against: str = ""


def evaluate_run(
    plan: RunPlan, request: EvaluationRequest = EvaluationRequest(), report: Callable[[str], None] = lambda _: None
) -> Comparison:
    """Compare base and tuned model on held-out rows; also write the result into the run folder.

    Args:
        plan: Plan of a finished run.
        request: How the run is evaluated.
        report: Takes a line about the processes that measure.

    Raises:
        UserError: The run has not finished, there are no such rows, the test rows were opened before, or a model cannot
            be measured.
    """
    _require_inputs(plan)
    against = _against(request)
    # Only here: reading a result needs no torch.
    from packhorse.evaluate.evaluate_run import Means, compare_on_held_out, compare_on_test

    launcher = partial(launcher_of, request=request, report=report)
    means = Means(launcher, request.endpoint, request.base_endpoint, against)
    evaluation = compare_on_test(plan, request.again, means) if request.test else compare_on_held_out(plan, means)
    text = evaluation.comparison.model_dump_json(indent=2) + "\n"
    folder, reference = Path(plan.run_folder), evaluation.comparison.reference if against is not None else ""
    _write_rows(evaluation.rows, rows_file(folder, request.test, reference))
    replace_file(result_file(folder, request.test, reference), text)
    return evaluation.comparison


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


def _write_rows(rows: list[dict[str, Any]], file: Path) -> None:
    """Write one row per document; a column that some rows lack is null there."""
    columns = dict.fromkeys(name for row in rows for name in row)
    table = pa.table({name: [row.get(name) for row in rows] for name in columns})
    file.parent.mkdir(exist_ok=True)
    beside = file.with_name(f".{file.name}")
    parquet.write_table(table, beside)
    beside.replace(file)


def rows_file(run_folder: Path, test: bool = False, reference: str = "") -> Path:
    """Return the path of the values and answers by row; `reference` is the name of a model in place of the base."""
    folder = run_folder / EVALUATION_FOLDER
    if reference:
        return folder / f"{_against_name(test, reference)}.parquet"
    return folder / (TEST_ROWS_FILE if test else ROWS_FILE)


def result_file(run_folder: Path, test: bool = False, reference: str = "") -> Path:
    """Return the path of an evaluation's result; `reference` is the name of a model in place of the base."""
    if reference:
        return run_folder / EVALUATION_FOLDER / f"{_against_name(test, reference)}.json"
    return run_folder / (TEST_EVALUATION_FILE if test else EVALUATION_FILE)


def _against_name(test: bool, reference: str) -> str:
    return f"{'test-' * test}against-{reference}"
