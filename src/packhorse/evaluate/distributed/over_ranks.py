"""Measure the models of a run by launched processes, one launch per model, or one for an adapter and its base."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from packhorse.evaluate.distributed.exchange import MeasureRequest, read_measured, write_request
from packhorse.evaluate.measure import Measured, Work
from packhorse.plan.run_plan import RunPlan, write_plan

Launch = Callable[[RunPlan, Path], None]
"""Function that runs the processes of a plan, whose request is in a folder, to their end."""


@dataclass(frozen=True)
class Launcher:
    """Launches the processes that measure.

    Attributes:
        plan: Plan of the processes; its folder is the last word of its command line.
        launch: Runs them.
        answers: File of known answers.
    """

    plan: RunPlan
    launch: Launch
    answers: Path

    def measure(
        self, models: dict[str, str], work: Sequence[Work], tokenizer: Path | None = None
    ) -> list[list[Measured]]:
        """Return the results of each model in one launch.

        Args:
            models: `base`, `tuned`, or a folder of weights -> fingerprint of the weights; two only for an adapter.
            work: What they are measured on, one item per set.
            tokenizer: Folder of the tokenizer; None for that of the run.

        Raises:
            UserError: A rank failed.
        """
        folder = Path(self.plan.argv[-1]).parent
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_plan(self.plan, folder)
        request = MeasureRequest(models, str(tokenizer) if tokenizer else "", str(self.answers))
        write_request(folder, request, work)
        self.launch(self.plan, folder)
        measured = read_measured(folder)
        shutil.rmtree(folder)
        return [measured[name] for name in models]
