"""Rank 0's output: metrics file, trackers, progress bar, status file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from packhorse.data.data_manifest import read_data_manifest
from packhorse.plan.run_plan import RunPlan
from packhorse.run_folder.layout import METRICS_FILE
from packhorse.run_folder.metrics import MetricsFile
from packhorse.run_folder.status import State, Status, write_status
from packhorse.track.meter import Figures
from packhorse.track.progress import open_progress
from packhorse.track.trackers import GuardedTracker, open_trackers
from packhorse.train.state import TrainState


class Reporter:
    """Passes figures to files, trackers and terminal on rank 0; does nothing on other ranks."""

    def __init__(self, plan: RunPlan, state: TrainState, attempt: int, is_main: bool) -> None:
        self._plan, self._attempt, self._is_main = plan, attempt, is_main
        if not is_main:
            return
        folder = Path(plan.run_folder)
        # Figures that were held back are reported now, with the number of the step that is done already.
        first = state.step + (state.step > 0 and state.held_back is None)
        trackers = open_trackers(plan.recipe, folder, first, _data_facts(folder))
        self._metrics = MetricsFile(folder / METRICS_FILE, first)
        self._sinks: list[MetricsFile | GuardedTracker] = [self._metrics, *trackers]
        self._progress = open_progress(Console(), plan.num_steps or 0, state.step)

    def begin(self, state: TrainState, figures: Figures) -> None:
        """Report what was measured before the first step; a resumed run has reported it already."""
        if self._is_main and state.step == 0:
            self._log(0, figures)
        self.write_status("training", state)

    def step(self, state: TrainState, figures: Figures) -> None:
        """Report the figures of a finished step."""
        if self._is_main:
            self._log(state.step, figures)
            if "train/loss" in figures:  # a skipped step has none
                self._progress.update(state.step, figures)
        self.write_status("training", state)

    def sync(self) -> None:
        """Wait until all figures so far are on disk; called before a checkpoint of their step."""
        if self._is_main:
            self._metrics.sync()

    def write_status(self, run_state: State, state: TrainState, message: str = "") -> None:
        """Write the status file."""
        if self._is_main:
            write_run_status(self._plan, run_state, state, self._attempt, message)

    def close(self) -> None:
        """Close terminal output and files."""
        if self._is_main:
            self._progress.close()
            for sink in self._sinks:
                sink.close()

    def _log(self, step: int, figures: Figures) -> None:
        for sink in self._sinks:
            sink.log(step, figures)


def write_run_status(plan: RunPlan, run_state: State, state: TrainState, attempt: int, message: str = "") -> None:
    """Write the status file of a run."""
    status = Status(state=run_state, step=state.step, num_steps=plan.num_steps or 0, attempt=attempt, message=message)
    write_status(Path(plan.run_folder), status)


def _data_facts(run_folder: Path) -> dict[str, Any]:
    """Return what W&B shows about the data: the ledger of all rows, and the findings."""
    manifest = read_data_manifest(run_folder)
    if manifest is None:
        return {}
    return {"data_ledger": manifest.ledger.model_dump(), "data_findings": manifest.findings}
