"""Numbers that are none, and losses that jump: the step is not made, left out, or the run goes back before it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

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
from packhorse.train.guard.spikes import spike_score
from packhorse.train.ranks.another_attempt import AnotherAttempt

logger = logging.getLogger(__name__)


def times_factor(loss_sum: Tensor, factor: float) -> Tensor:
    """The loss that is differentiated; one that is no number makes its whole gradient none.

    A loss can be infinite and its gradient finite. This way the norm of the gradient, which all ranks know before they
    step, tells of it, and nothing has to be read or sent meanwhile.

    Args:
        loss_sum: Scalar.
        factor: What the engine's averaging is undone by.
    """
    return loss_sum * torch.where(torch.isfinite(loss_sum.detach()), factor, math.nan)


@dataclass(frozen=True)
class Step:
    """A step as all ranks know it once it is computed.

    Attributes:
        number: Counted from 1.
        batch: What it saw.
        losses: Sum of token losses of each micro-batch on this rank.
        loss_sum: Of the token losses of the whole step.
        grad_norm: Of the whole gradient, before clipping.
        num_bad_ranks: Ranks whose gradient norm is no number.
    """

    number: int
    batch: StepBatch
    losses: list[Tensor]
    loss_sum: float
    grad_norm: float
    num_bad_ranks: int

    @property
    def loss(self) -> float:
        """Nats per supervised token."""
        return self.loss_sum / self.batch.num_supervised_tokens

    @property
    def is_finite(self) -> bool:
        """The same on every rank."""
        return math.isfinite(self.loss) and self.num_bad_ranks == 0


@dataclass(frozen=True)
class Judgement:
    """What follows from a step's numbers.

    Attributes:
        learnt: The step changed the weights as it should.
        figures: To be reported with the step.
        ends: What to raise once it is reported; None to go on.
    """

    learnt: bool = True
    figures: Figures = field(default_factory=dict)
    ends: UserError | None = None

    @property
    def is_reported(self) -> bool:
        """Whether the step is reported although no report is due."""
        return bool(self.figures) or self.ends is not None


class Numbers:
    """Judges each step; every method is called by all ranks alike.

    Attributes:
        left_out: Step, counted from 1, to why its update is not made.
    """

    def __init__(
        self,
        plan: RunPlan,
        engine: Engine,
        loader: PackLoader,
        sequence: SequenceGroup | None,
        is_main: bool,
        finish_saving: Callable[[], None],
    ) -> None:
        """Reads what is left out; a collective.

        Args:
            plan: The run.
            engine: Its ranks.
            loader: Where a step's packs come from.
            sequence: The ranks that share each pack with this one.
            is_main: Whether this is rank 0.
            finish_saving: Waits for the checkpoint that is being written; a collective.

        Raises:
            UserError: The ranks do not read the same.
        """
        self._plan, self._engine, self._loader, self._sequence = plan, engine, loader, sequence
        self._recovery, self._is_main = plan.recipe.recovery, is_main
        self._folder = Path(plan.run_folder)
        self._checkpoints = self._folder / CHECKPOINTS_FOLDER
        self._finish_saving = finish_saving
        self.left_out = read_skipped_steps(self._folder)
        self._assert_alike()

    def figures(self, step: int) -> Figures:
        """How many steps up to this one are left out; nothing while none is."""
        count = sum(number <= step for number in self.left_out)
        return {"recovery/left_out": count} if count else {}

    def judge(self, step: Step, recent_losses: Iterable[float]) -> Judgement:
        """What follows from a step whose update is made, or was refused by the engine.

        Args:
            step: As all ranks know it.
            recent_losses: Of the steps before it.
        """
        if not step.is_finite:
            return self._not_finite(step)
        if self._recovery.on_spike == "ignore":
            return Judgement()
        score = spike_score(step.loss, list(recent_losses), self._recovery.spike_window)
        if score is None or score < self._recovery.spike_score:
            return Judgement()
        figures = {"recovery/spike_score": score}
        if self._recovery.on_spike == "rewind":
            return Judgement(figures=figures, ends=self._rewind(step, score))
        logger.warning("step %d: the loss is %.4g, %s", step.number, step.loss, _above(score))
        return Judgement(figures=figures)

    def _not_finite(self, step: Step) -> Judgement:
        stops = self._recovery.on_nonfinite == "stop" or self._engine.steps_in_backward
        cause = find_cause(
            self._engine, self._loader, self._sequence, step.number, step.batch, step.losses, compute_again=stops
        )
        done = self._done(step)
        if stops or done or cause.in_weights:
            self._finish_saving()
            return Judgement(learnt=False, ends=_stopped(step, cause, self._checkpoints, done))
        why = f"the loss is {step.loss} and the gradient norm {step.grad_norm}; {cause}"
        logger.warning("step %d is left out: %s", step.number, why)
        too_many = self._too_many([step.number], why)
        if too_many is None:
            self._leave_out([step.number], why)
        return Judgement(learnt=False, figures=self.figures(step.number), ends=too_many)

    def _done(self, step: Step) -> str:
        """What became of a bad step's update where not every rank has left it out; else empty."""
        world = self._plan.topology.world_size
        if 0 < step.num_bad_ranks < world:  # of one gradient, so that something is wrong with a device
            return f"{step.num_bad_ranks} of {world} ranks have left it out, the others have stepped"
        if self._engine.step_was_refused or self._engine.step_was_skipped:
            return ""
        return "weights were stepped in the backward pass"

    def _rewind(self, step: Step, score: float) -> UserError:
        """Takes the run back; after it every rank ends. What is done first, is done again if this is broken off."""
        steps = range(max(1, step.number - self._recovery.rewind_steps + 1), step.number + 1)
        fact = f"at step {step.number} the loss is {step.loss:.4g}, {_above(score)}"
        too_many = self._too_many(steps, fact)
        if too_many is not None:
            return too_many
        self._finish_saving()  # else it would appear after those that hold these steps are removed
        if self._is_main:
            for checkpoint in reversed(checkpoints_in(self._checkpoints)):
                if step_of(checkpoint) >= steps[0]:
                    remove_checkpoint(checkpoint)  # it holds updates that are taken back
        self._leave_out(steps, fact)
        return AnotherAttempt(
            "rewind",
            f"{fact}; the run goes back before step {steps[0]}.",
            f"recovery.on_spike is rewind: the updates of steps {steps[0]} to {step.number} are left out.",
            f"go on with `packhorse resume {self._folder}`; `packhorse train` does so by itself.",
            EXIT_STOPPED,
        )

    def _too_many(self, steps: Iterable[int], why: str) -> UserError | None:
        """The end of a run that would leave out more steps than it may; they are not recorded then."""
        count, most = len(self.left_out.keys() | set(steps)), self._recovery.most_left_out
        if count <= most:
            return None
        self._finish_saving()
        return UserError(
            f"{count} steps would be left out, and recovery.most_left_out is {most}; the last: {why}.",
            "so many bad steps are no accident: the run as it is set does not train.",
            "train again under another name with a lower optimizer.learning_rate; or look at the rows, and go on with "
            f"`packhorse resume {self._folder} recovery.most_left_out={2 * count}`.",
            exit_code=EXIT_NOT_FINITE,
        )

    def _leave_out(self, steps: Iterable[int], why: str) -> None:
        """Records steps, on disk before any rank goes on."""
        self.left_out |= {step: why for step in steps if step not in self.left_out}
        if self._is_main:
            write_skipped_steps(self._folder, self.left_out)
        self._assert_alike()

    def _assert_alike(self) -> None:
        """Waits for all ranks, and proves that they leave out the same steps."""
        mine = [float(len(self.left_out)), float(sum(self.left_out)), float(sum(step**2 for step in self.left_out))]
        total = self._engine.sum_over_ranks(mine)
        if total != [self._plan.topology.world_size * value for value in mine]:
            raise UserError(
                f"this rank leaves out {len(self.left_out)} steps, all ranks together {total[0]:.0f}.",
                "ranks that leave out other steps train other models.",
                "put the run folder where every node sees the same files (runs_folder).",
            )


def _above(score: float) -> str:
    return f"{score:.1f} robust standard deviations above the median of the steps before it"


def _stopped(step: Step, cause: Cause, checkpoints: Path, done: str) -> UserError:
    """The end of a run; `done`: what became of the update, empty where none was made."""
    newest = newest_complete(checkpoints)
    stands = f"the newest checkpoint is of step {step_of(newest)}" if newest else "there is no checkpoint yet"
    skip = "" if cause.in_weights or done else "; recovery.on_nonfinite=skip beside --resume leaves it out"
    return UserError(
        f"at step {step.number} the loss is {step.loss} and the gradient norm {step.grad_norm}: {cause}.",
        f"{f'{done}, and nothing of it is saved' if done else 'no update was made with it'}; {stands}.",
        "train again under another name with a lower optimizer.learning_rate or a longer schedule.warmup_ratio. "
        f"Resumed, the run meets the same step again{skip}.",
        exit_code=EXIT_NOT_FINITE,
    )
