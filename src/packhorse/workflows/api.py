"""Functions of the public Python API; `import packhorse` offers them by name. See docs/python-api.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packhorse.errors import EXIT_OK
from packhorse.recipe import load
from packhorse.recipe.schema import Recipe
from packhorse.run_folder import folder
from packhorse.workflows import new_run, resume_run
from packhorse.workflows.new_run import RunEnd
from packhorse.workflows.plan_request import PlanResult, completed, plan_request, plan_with_estimates, read_gpus
from packhorse.workflows.prepare import prepare_data
from packhorse.workflows.run import Run

if TYPE_CHECKING:
    from packhorse.data.audit_report import AuditReport
    from packhorse.data.prepare import PreparedData
    from packhorse.evaluate.results import Comparison


class RunFailedError(Exception):
    """A run on this machine failed, or was stopped.

    Attributes:
        exit_code: Exit code of the command line for this end, see `packhorse.errors`.
        run: The run, which can be resumed; None if it was stopped before it had a folder.
    """

    def __init__(self, end: RunEnd) -> None:
        super().__init__(end.message)
        self.exit_code = end.exit_code
        self.run = Run(end.plan) if end.plan is not None else None


def load_recipe(path_or_name: str | Path, **overrides: Any) -> Recipe:  # noqa: ANN401
    """Load a recipe from a file or by the name of a shipped recipe.

    Args:
        path_or_name: YAML file, or a name such as `quickstart/full`.
        overrides: Values by recipe key. A nested key is given as `**{"optimizer.learning_rate": 1e-4}`.

    Raises:
        UserError: The recipe cannot be read or has mistakes, all of which are named.
    """
    return load.load_recipe(str(path_or_name), _override_words(overrides))


def check(recipe: Recipe | str) -> AuditReport:
    """Read and render the rows of a recipe; return splits, lengths and findings, and write data.html.

    Raises:
        UserError: Rows are wrong, or files are missing.
    """
    # Only here: the other functions need no tokenizer.
    from packhorse.workflows.check import check_recipe

    return check_recipe(_recipe(recipe)).report


def prepare(recipe: Recipe | str) -> PreparedData:
    """Tokenize and pack the rows of a recipe, once; return the folder and its manifest.

    Raises:
        UserError: Rows are wrong, or files are missing.
    """
    return prepare_data(_recipe(recipe))


def plan(
    recipe: Recipe | str,
    *,
    gpus: str = "",
    nodes: int | None = None,
    price: float | None = None,
    network: float | None = None,
    calibrate: str = "",
) -> PlanResult:
    """Return the plan of a recipe and its estimates. Needs no GPU, prepares and writes nothing.

    Args:
        recipe: Recipe, file or shipped name.
        gpus: GPUs in total and their kind, such as `8` or `8xH100-80GB`; empty takes this machine's.
        nodes: Number of machines that share them.
        price: Price of one GPU hour.
        network: Gbit/s per GPU between nodes.
        calibrate: Run whose measured steps correct the time estimate.

    Raises:
        UserError: The recipe cannot run on these GPUs, or a GPU is not known.
    """
    request = plan_request(_recipe(recipe), *read_gpus(gpus, nodes, network, price))
    return plan_with_estimates(completed(request, calibrate))


def train(recipe: Recipe | str, *, gpus: int | None = None, restarts: int | None = None, force: bool = False) -> Run:
    """Prepare the data of a recipe, train it on this machine, and return the finished run.

    Args:
        recipe: Recipe, file or shipped name.
        gpus: Number of processes, one per GPU; None takes the recipe's, or those of this machine.
        restarts: Attempts that may follow a failed one; None takes the recipe's.
        force: Whether to run even if the GPUs cannot hold the plan.

    Raises:
        UserError: The run cannot start; no device has been taken.
        RunFailedError: The run failed or was stopped.
    """
    return _finished(new_run.train(_recipe(recipe), gpus, restarts, force))


def resume(
    run: Run | str | Path,
    *,
    gpus: int | None = None,
    restarts: int | None = None,
    force: bool = False,
    **overrides: Any,  # noqa: ANN401
) -> Run:
    """Resume a run on this machine from its newest valid checkpoint, and return the finished run.

    Args:
        run: Run, its folder or its name.
        gpus: Number of processes, one per GPU; None takes those of the plan.
        restarts: Attempts that may follow a failed one; None takes the recipe's.
        force: Whether to run even if the GPUs cannot hold the plan.
        overrides: Values by recipe key that do not change what is learned, such as `**{"parallel.engine": "zero3"}`.

    Raises:
        UserError: There is no such run, it is running or finished, or it cannot resume on this machine.
        RunFailedError: The run failed or was stopped again.
    """
    words = _override_words(overrides)
    return _finished(resume_run.resume_here(_folder(run), words, gpus, restarts, force))


def open_run(path: str | Path) -> Run:
    """Open a run given by its folder, or by its name below `runs`.

    Raises:
        UserError: There is no such run, or it is a sweep.
    """
    return Run(folder.open_run(str(path)))


def evaluate(
    run: Run | str | Path,
    *,
    test: bool = False,
    again: bool = False,
    ranks: int | None = None,
    tasks: str | Path | None = None,
) -> Comparison:
    """Compare the base and the tuned model of a finished run on held-out rows; also keep the result in the run folder.

    Args:
        run: Run, its folder or its name.
        test: Whether to measure the sealed test rows.
        again: Whether to open the test rows although they were opened before.
        ranks: Number of processes that measure; None takes as many GPUs of this machine as the run trained on.
        tasks: Task file of lm-eval, or folder of them, to measure too.

    Raises:
        UserError: The run has not finished, there are no such rows, the test rows were opened before, or a task file
            has a mistake.
    """
    # Only here: it imports torch when it runs.
    from packhorse.workflows.evaluate import EvaluationRequest, evaluate_run

    request = EvaluationRequest(test, again, ranks, tasks=None if tasks is None else Path(tasks))
    return evaluate_run(folder.open_run(_folder(run)), request)


def _recipe(recipe: Recipe | str) -> Recipe:
    return recipe if isinstance(recipe, Recipe) else load.load_recipe(recipe)


def _folder(run: Run | str | Path) -> str:
    return str(run.path if isinstance(run, Run) else run)


def _override_words(overrides: dict[str, Any]) -> list[str]:
    """Return overrides as the command line takes them; JSON is YAML."""
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in overrides.items()]


def _finished(end: RunEnd) -> Run:
    if end.exit_code != EXIT_OK or end.plan is None:
        raise RunFailedError(end)
    return Run(end.plan)
