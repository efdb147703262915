"""Guards each step: one with NaN or Inf is skipped or ends the run, and a loss spike may rewind the run."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from packhorse.data.packs.loader import PackLoader, StepBatch
from packhorse.errors import EXIT_NOT_FINITE, EXIT_STOPPED, UserError
from packhorse.model.sequence import SequenceGroup
from packhorse.plan.run_plan import RunPlan
from packhorse.run_folder.checkpoints.listing import checkpoints_in, newest_complete, remove_checkpoint, step_of
from packhorse.run_folder.layout import CHECKPOINTS_FOLDER
from packhorse.run_folder.skipped_steps import read_skipped_steps, write_skipped_steps
from packhorse.track.meter import Figures
from packhorse.train.engine.engine import Engine
from packhorse.train.guard.diagnosis import Cause, find_cause
from packhorse.train.objectives.objective import Objective
from packhorse.train.ranks.attempt import AnotherAttempt

# A normal distribution's standard deviation is 1.4826 times its median absolute deviation; unlike a standard deviation,
# the latter does not move before half of the window is spikes (Iglewicz and Hoaglin 1993).
DEVIATIONS: Final = 1.4826
# A smooth run's losses scatter so little that any step would be a spike: nats, and share of the median.
MIN_SCATTER: Final = 0.01
# Share of the window that must be filled before the first score.
MIN_WINDOW_SHARE: Final = 0.25

logger = logging.getLogger(__name__)


def scaled_loss(loss_sum: Tensor, factor: float) -> Tensor:
    """Return the loss to differentiate; where it is NaN or Inf, its whole gradient becomes NaN.

    A loss can be infinite while its gradient is finite. With this, the gradient norm, which all ranks know before they
    step, shows every bad loss, and nothing else has to be read or sent.
    """
    return loss_sum * torch.where(torch.isfinite(loss_sum.detach()), factor, math.nan)


@dataclass(frozen=True)
class StepResult:
    """A computed step, as all ranks know it.

    Attributes:
        number: Step number, counted from 1.
        batch: Packs of the step on this rank.
        losses: Sum of unit losses of each micro-batch on this rank.
        loss_sum: Sum of unit losses of the whole step.
        grad_norm: Norm of the whole gradient, before clipping.
        num_bad_ranks: Ranks whose gradient norm is not finite.
    """

    number: int
    batch: StepBatch
    losses: list[Tensor]
    loss_sum: float
    grad_norm: float
    num_bad_ranks: int

    @property
    def loss(self) -> float:
        """Loss per unit; nats per supervised token for sft."""
        return self.loss_sum / self.batch.num_units

    @property
    def is_finite(self) -> bool:
        """Whether loss and gradients are finite; equal on every rank."""
        return math.isfinite(self.loss) and self.num_bad_ranks == 0


@dataclass(frozen=True)
class StepDecision:
    """What follows from a step's loss and gradient.

    Attributes:
        learnt: The step updated the weights.
        figures: Figures to report with the step.
        ends: Error to raise once the step is reported; None to continue.
    """

    learnt: bool = True
    figures: Figures = field(default_factory=dict)
    ends: UserError | None = None

    @property
    def is_reported(self) -> bool:
        """Whether the step is reported although no report is due."""
        return bool(self.figures) or self.ends is not None


class StepGuard:
    """Decides about each step; every method is called by all ranks alike.

    Attributes:
        skipped_steps: Step number, counted from 1, to the reason why its update is skipped.
    """

    def __init__(
        self,
        plan: RunPlan,
        engine: Engine,
        loader: PackLoader,
        objective: Objective,
        sequence: SequenceGroup | None,
        is_main: bool,
        finish_saving: Callable[[], None],
    ) -> None:
        """Read the steps to skip; a collective.

        Args:
            plan: Plan of the run.
            engine: This rank's engine.
            loader: Source of each step's packs.
            objective: Computes the loss of a micro-batch.
            sequence: Ranks that share each pack with this one.
            is_main: Whether this is rank 0.
            finish_saving: Waits for the checkpoint that is being written; a collective.

        Raises:
            UserError: The ranks read different steps.
        """
        self._plan, self._engine, self._loader = plan, engine, loader
        self._objective, self._sequence = objective, sequence
        self._recovery, self._is_main = plan.recipe.recovery, is_main
        self._folder = Path(plan.run_folder)
        self._checkpoints = self._folder / CHECKPOINTS_FOLDER
        self._finish_saving = finish_saving
        self.skipped_steps = read_skipped_steps(self._folder)
        self._assert_equal_on_ranks()

    def figures(self, step: int) -> Figures:
        """Return the number of skipped steps up to this one; empty while there are none."""
        count = sum(number <= step for number in self.skipped_steps)
        return {"recovery/skipped": count} if count else {}

    def judge(self, step: StepResult, recent_losses: Sequence[float]) -> StepDecision:
        """Decide about a step that was made, or that the engine refused.

        Args:
            step: Result of the step, as all ranks know it.
            recent_losses: Losses of the steps before it.
        """
        if not step.is_finite:
            return self._not_finite(step)
        if self._recovery.on_spike == "ignore":
            return StepDecision()
        score = spike_score(step.loss, recent_losses, self._recovery.spike_window)
        if score is None or score < self._recovery.spike_score:
            return StepDecision()
        figures = {"recovery/spike_score": score}
        if self._recovery.on_spike == "rewind":
            return StepDecision(figures=figures, ends=self._rewind(step, score))
        logger.warning("step %d: the loss is %.4g, %s", step.number, step.loss, _above(score))
        return StepDecision(figures=figures)

    def _not_finite(self, step: StepResult) -> StepDecision:
        stops = self._recovery.on_nonfinite == "stop" or self._engine.steps_in_backward
        cause = find_cause(
            self._engine,
            self._loader,
            self._objective,
            self._sequence,
            step.number,
            step.batch,
            step.losses,
            compute_again=stops,
        )
        partial_update = self._partial_update(step)
        if stops or partial_update or cause.in_weights:
            self._finish_saving()
            return StepDecision(learnt=False, ends=_not_finite_error(step, cause, self._checkpoints, partial_update))
        why = f"the loss is {step.loss} and the gradient norm {step.grad_norm}; {cause}"
        logger.warning("step %d is skipped: %s", step.number, why)
        too_many = self._too_many([step.number], why)
        if too_many is None:
            self._skip([step.number], why)
        return StepDecision(learnt=False, figures=self.figures(step.number), ends=too_many)

    def _partial_update(self, step: StepResult) -> str:
        """Describe a bad step's update where not every rank has skipped it; empty where all have."""
        world = self._plan.topology.world_size
        if 0 < step.num_bad_ranks < world:  # they all hold the same gradient, so something is wrong with a device
            return f"{step.num_bad_ranks} of {world} ranks have skipped it, the others have stepped"
        if self._engine.step_was_refused or self._engine.step_was_skipped:
            return ""
        return "weights were stepped in the backward pass"

    def _rewind(self, step: StepResult, score: float) -> UserError:
        """Take the run back to before a spike, and return what then ends every rank.

        The order makes an interruption harmless: checkpoints are removed before the steps are recorded, so an
        interrupted rewind meets the same spike and is done again.
        """
        steps = range(max(1, step.number - self._recovery.rewind_steps + 1), step.number + 1)
        fact = f"at step {step.number} the loss is {step.loss:.4g}, {_above(score)}"
        too_many = self._too_many(steps, fact)
        if too_many is not None:
            return too_many
        # A checkpoint still being written would appear after those that hold the same steps are removed.
        self._finish_saving()
        if self._is_main:
            # Newest first: an interruption must not leave a newer checkpoint that a resume would take.
            for checkpoint in reversed(checkpoints_in(self._checkpoints)):
                if step_of(checkpoint) >= steps[0]:
                    remove_checkpoint(checkpoint)  # it holds updates that are taken back
        self._skip(steps, fact)
        return AnotherAttempt(
            "rewind",
            f"{fact}; the run goes back before step {steps[0]}.",
            f"recovery.on_spike is rewind: the updates of steps {steps[0]} to {step.number} are skipped.",
            f"resume with `packhorse resume {self._folder}`; `packhorse train` does so automatically.",
            EXIT_STOPPED,
        )

    def _too_many(self, steps: Iterable[int], why: str) -> UserError | None:
        """Return the error that ends a run with too many skipped steps; the new ones are then not recorded."""
        count, most = len(self.skipped_steps.keys() | set(steps)), self._recovery.most_skipped
        if count <= most:
            return None
        self._finish_saving()
        return UserError(
            f"{count} steps would be skipped, and recovery.most_skipped is {most}; the last: {why}.",
            "this many bad steps are no accident: the run does not train with these settings.",
            "train again under another name with a lower optimizer.learning_rate; or inspect the rows, and resume with "
            f"`packhorse resume {self._folder} recovery.most_skipped={2 * count}`.",
            exit_code=EXIT_NOT_FINITE,
        )

    def _skip(self, steps: Iterable[int], why: str) -> None:
        """Record skipped steps, on disk before any rank continues."""
        self.skipped_steps |= {step: why for step in steps if step not in self.skipped_steps}
        if self._is_main:
            write_skipped_steps(self._folder, self.skipped_steps)
        self._assert_equal_on_ranks()

    def _assert_equal_on_ranks(self) -> None:
        """Wait for all ranks, and check that they skip the same steps."""
        steps = self.skipped_steps
        own = [float(len(steps)), float(sum(steps)), float(sum(step**2 for step in steps))]
        total = self._engine.sum_over_ranks(own)
        if total != [self._plan.topology.world_size * value for value in own]:
            raise UserError(
                f"this rank skips {len(steps)} steps, all ranks together {total[0]:.0f}.",
                "ranks that skip different steps train different models.",
                "put the run folder where every node sees the same files (runs_folder).",
            )


def spike_score(loss: float, before: Sequence[float], window_steps: int) -> float | None:
    """Return the robust z-score of a loss among those before it.

    Args:
        loss: Loss of one step, nats per supervised token.
        before: Losses of up to `window_steps` steps before it.
        window_steps: Size of the window.

    Returns:
        Distance from the median, positive above it; None while there are too few losses.
    """
    if len(before) < MIN_WINDOW_SHARE * window_steps:
        return None
    median = statistics.median(before)
    scatter = DEVIATIONS * statistics.median(abs(other - median) for other in before)
    return (loss - median) / max(scatter, MIN_SCATTER, MIN_SCATTER * median)


def _above(score: float) -> str:
    return f"{score:.1f} robust standard deviations above the median of the steps before it"


def _not_finite_error(step: StepResult, cause: Cause, checkpoints: Path, partial_update: str) -> UserError:
    """Return the error that ends the run; `partial_update` is empty where no update was made."""
    newest = newest_complete(checkpoints)
    saved = f"the newest checkpoint is of step {step_of(newest)}" if newest else "there is no checkpoint yet"
    skip = "" if cause.in_weights or partial_update else "; `packhorse resume RUN recovery.on_nonfinite=skip` skips it"
    return UserError(
        f"at step {step.number} the loss is {step.loss} and the gradient norm {step.grad_norm}: {cause}.",
        f"{f'{partial_update}; this is not saved' if partial_update else 'no update was made with it'}; {saved}.",
        "train again under another name with a lower optimizer.learning_rate or a longer schedule.warmup_ratio. "
        f"Resumed, the run comes to the same step again{skip}.",
        exit_code=EXIT_NOT_FINITE,
    )
