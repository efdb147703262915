"""RUN/model/result.json or RUN/adapter/result.json: which step the published weights are of."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from packhorse.plan.run_plan import PlanPart
from packhorse.run_folder.layout import ADAPTER_FOLDER, MODEL_FOLDER, RESULT_FILE


class Result(PlanPart):
    """The step whose weights are the result of a run."""

    step: int
    last_step: int
    """Step at which training ended."""
    publish: Literal["last", "best"]
    """`checkpoint.publish` of the recipe."""
    validation_loss: float | None
    """Nats per supervised token at `step`; None if it was not measured there."""

    @property
    def words(self) -> str:
        """What the result is, for people."""
        loss = "" if self.validation_loss is None else f" (validation loss {self.validation_loss:.4f})"
        if self.publish == "best":
            return f"step {self.step:,} of {self.last_step:,}: the checkpoint with the lowest validation loss{loss}"
        return f"step {self.step:,}, the last one{loss}"


def write_result(folder: Path, result: Result) -> None:
    """Write the record into the folder of the weights, before that is published."""
    (folder / RESULT_FILE).write_text(result.model_dump_json(indent=2) + "\n", encoding="utf-8")


def read_result(run_folder: Path) -> Result | None:
    """Return the record of a run; None before it has a result, or if an older version wrote it."""
    for name in (MODEL_FOLDER, ADAPTER_FOLDER):
        file = run_folder / name / RESULT_FILE
        if file.is_file():
            return Result.model_validate_json(file.read_text(encoding="utf-8"))
    return None
