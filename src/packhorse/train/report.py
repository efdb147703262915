"""Rank 0's voice: metrics file, trackers, progress bar, status file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from packhorse.data.data_manifest import read_data_manifest
from packhorse.plan.run_plan import RunPlan
from packhorse.run_folder.status import State, Status, write_status
from packhorse.track.meter import Figures
from packhorse.track.progress import open_progress
from packhorse.track.sinks import METRICS_FILE, MetricsFile, Sinks
from packhorse.track.trackers import open_trackers
from packhorse.train.state import TrainState


class Reporter:
    """Takes figures on rank 0 and hands them on; on other ranks it is silent."""

    def __init__(self, plan: RunPlan, state: TrainState, attempt: int, is_main: bool) -> None:
        self._plan, self._attempt, self._is_main = plan, attempt, is_main
        if not is_main:
            return
        folder = Path(plan.run_folder)
        # What was held back is reported with its step's number now.
        first = state.step + (state.step > 0 and state.held_back is None)
        trackers = open_trackers(plan.recipe, folder, first, _data_facts(folder))
        self._metrics = MetricsFile(folder / METRICS_FILE, first)
        self._sinks = Sinks([self._metrics, *trackers])
        self._progress = open_progress(Console(), plan.num_steps or 0, state.step)

    def begin(self, state: TrainState, figures: Figures) -> None:
        """Takes what was measured before the first step; a resumed run logged it long ago."""
        if self._is_main and state.step == 0:
            self._sinks.log(0, figures)
        self.tell("training", state)

    def step(self, state: TrainState, figures: Figures) -> None:
        """Takes the figures of a finished step."""
        if self._is_main:
            self._sinks.log(state.step, figures)
            if "train/loss" in figures:  # a step that is left out has none
                self._progress.update(state.step, figures)
        self.tell("training", state)

    def settle(self) -> None:
        """Waits until all figures so far are on disk; before a checkpoint of their step."""
        if self._is_main:
            self._metrics.sync()

    def tell(self, what: State, state: TrainState) -> None:
        """Writes the status file."""
        if self._is_main:
            tell(self._plan, what, state, self._attempt)

    def close(self) -> None:
        """Leaves terminal and files in order."""
        if self._is_main:
            self._progress.close()
            self._sinks.close()


def tell(plan: RunPlan, what: State, state: TrainState, attempt: int, message: str = "") -> None:
    """Writes the status file of a run."""
    status = Status(state=what, step=state.step, num_steps=plan.num_steps or 0, attempt=attempt, message=message)
    write_status(Path(plan.run_folder), status)


def _data_facts(run_folder: Path) -> dict[str, Any]:
    """What W&B shows of the data: what became of every row, and what was found in them."""
    manifest = read_data_manifest(run_folder)
    if manifest is None:
        return {}
    return {"data_ledger": manifest.ledger.model_dump(), "data_findings": manifest.findings}
