"""A run folder as a Python object: plan, status, metrics, evaluation, paths."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from packhorse.plan.run_plan import RunPlan
from packhorse.recipe.schema import Recipe
from packhorse.run_folder.layout import CHECKPOINTS_FOLDER, LOGS_FOLDER, METRICS_FILE
from packhorse.run_folder.metrics import read_metrics
from packhorse.run_folder.status import Status, read_status
from packhorse.workflows.evaluate import result_file

if TYPE_CHECKING:
    import pyarrow

    from packhorse.evaluate.results import Comparison


@dataclass(frozen=True)
class Run:
    """A run. Everything but the plan is read from the folder when it is used.

    Attributes:
        plan: Plan of the run.
    """

    plan: RunPlan

    @property
    def path(self) -> Path:
        """The run folder."""
        return Path(self.plan.run_folder)

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.plan.recipe.name

    @property
    def recipe(self) -> Recipe:
        """Recipe of the run, with every value that the plan chose."""
        return self.plan.recipe

    @property
    def status(self) -> Status | None:
        """State and step of the run, as RUN/status.json has them."""
        return read_status(self.path)

    @property
    def metrics(self) -> pyarrow.Table:
        """Metrics, one row per log line and one column per metric; a metric that a line lacks is null."""
        # Only here: it is the one property that needs pyarrow.
        import pyarrow

        lines = list(read_metrics(self.path / METRICS_FILE))
        names = dict.fromkeys(name for line in lines for name in line)
        return pyarrow.table({name: [line.get(name) for line in lines] for name in names})

    @property
    def evaluation(self) -> Comparison | None:
        """Result of the last `evaluate` on validation rows; None before the first."""
        return self._result(test=False)

    @property
    def test_evaluation(self) -> Comparison | None:
        """Result of the last `evaluate` on the sealed test rows; None before the first."""
        return self._result(test=True)

    @property
    def weights(self) -> Path | None:
        """RUN/model or RUN/adapter; None before the run has finished."""
        return next((path for name in ("model", "adapter") if (path := self.path / name).is_dir()), None)

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / CHECKPOINTS_FOLDER

    @property
    def logs(self) -> Path:
        """Folder of the logs, with one folder per attempt."""
        return self.path / LOGS_FOLDER

    def _result(self, test: bool) -> Comparison | None:
        # Only here: it imports pydantic models that the other properties do not need.
        from packhorse.evaluate.results import Comparison

        file = result_file(self.path, test)
        return Comparison.model_validate_json(file.read_text(encoding="utf-8")) if file.is_file() else None
