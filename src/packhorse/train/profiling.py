"""Records torch's profiler over the steps of `track.profile`, with the phases of the step loop as marks.

The step loop has no code for it: the heartbeat reports each phase. Outside the window nothing is recorded, and nothing
waits for the device.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path

import torch
from torch.profiler import profile, record_function

from packhorse.plan.run_plan import RunPlan
from packhorse.run_folder.heartbeat import Phase
from packhorse.run_folder.layout import memory_snapshot_path, trace_path

logger = logging.getLogger(__name__)


class StepProfiler:
    """Profiles the steps from `first` to `last` that this attempt makes; writes what it has when it is closed."""

    def __init__(self, run_folder: Path, first: int, last: int, rank: int, device: torch.device) -> None:
        self._run_folder, self._first, self._last, self._rank, self._device = run_folder, first, last, rank, device
        self._profile: profile | None = None
        self._recorded: list[int] = []
        self._step_mark, self._phase_mark = ExitStack(), ExitStack()

    def phase(self, name: Phase, step: int | None) -> None:
        """Take the begin of a phase; `step` is the number of steps done, where it is known.

        A step begins with its data, or with the optimizer where a recorded bad step is skipped.
        """
        self._phase_mark.close()
        if step is not None and name in ("data", "optimizer"):
            self._begin_step(step + 1)
        if self._recorded:
            self._phase_mark.enter_context(record_function(f"phase {name}"))

    def close(self) -> None:
        """Write the trace of the recorded steps, if there are any, and stop."""
        self._phase_mark.close()
        self._step_mark.close()
        if self._profile is None:
            return
        if not self._recorded:
            self._profile.start_trace()
        self._wait_for_device()
        self._profile.stop_trace()
        if self._recorded:
            self._write(self._profile)
        self._profile, self._recorded = None, []
        self._first = self._last + 1

    def _begin_step(self, number: int) -> None:
        self._step_mark.close()
        if number > self._last:
            self.close()
        if not self._first - 1 <= number <= self._last:
            return
        if self._profile is None:
            # CUPTI takes seconds to start: in the step before, where there is one.
            self._profile = profile()
            self._profile.prepare_trace()
        if number < self._first:
            return
        if not self._recorded:
            self._wait_for_device()
            self._profile.start_trace()
            if self._device.type == "cuda":
                torch.cuda.memory._record_memory_history(stacks="python")
        self._recorded.append(number)
        self._step_mark.enter_context(record_function(f"step {number}"))

    def _wait_for_device(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _write(self, recorded: profile) -> None:
        trace = trace_path(self._run_folder, self._recorded[0], self._recorded[-1], self._rank)
        draft = trace.with_name(f".{trace.name}")
        try:
            trace.parent.mkdir(exist_ok=True)
            if self._device.type == "cuda":
                torch.cuda.memory._dump_snapshot(str(memory_snapshot_path(trace)))  # type: ignore[no-untyped-call]
                torch.cuda.memory._record_memory_history(enabled=None)
            recorded.export_chrome_trace(str(draft))
            draft.rename(trace)
        except OSError as error:
            # A trace does not justify losing a training run.
            logger.warning("%s cannot be written (%s); training continues.", trace, error.strerror)


def step_profiler(plan: RunPlan, rank: int, device: torch.device) -> StepProfiler | None:
    """Return the profiler of a rank; None where the recipe requests no trace of it."""
    requested = plan.recipe.track.profile
    if requested is None or (rank > 0 and not requested.all_ranks):
        return None
    return StepProfiler(Path(plan.run_folder), *requested.steps, rank, device)
