"""The step loop. One optimizer step consumes the packs that the batch plan fixes, on any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from packhorse.data.packs.loader import PackLoader, StepBatch
from packhorse.model.sequence import SequenceGroup
from packhorse.plan.run_plan import RunPlan
from packhorse.run_folder.heartbeat import HeartbeatWriter
from packhorse.track.meter import Figures, Meter
from packhorse.train.checkpoint.checkpoints import Checkpoints
from packhorse.train.engine.engine import Engine
from packhorse.train.engine.optimizer import learning_rate_at, set_learning_rate
from packhorse.train.gradient_noise import NoiseScale
from packhorse.train.guard.memory_error import note_micro_batch
from packhorse.train.guard.step_guard import StepDecision, StepGuard, StepResult, scaled_loss
from packhorse.train.objectives.objective import Objective, Tally
from packhorse.train.ranks.agreement import Agreed, Agreement
from packhorse.train.ranks.signals import Stopped
from packhorse.train.reporter import Reporter
from packhorse.train.state import TrainState, seed_step


@dataclass(frozen=True)
class TrainingRun:
    """Everything that the step loop works with.

    Attributes:
        objective: Computes the loss of a micro-batch.
        sequence: Ranks that share each pack with this one, None where packs are not cut.
        agreement: Exchanges requests and results between ranks after each step.
        guard: Decides about each step's loss and gradient.
        pulse: Heartbeat that names the current phase.
        evaluate: Measures the validation loss and its figures on all ranks, None where there are no validation rows.
            Raises Stopped where the ranks agree to stop.
    """

    plan: RunPlan
    engine: Engine
    loader: PackLoader
    objective: Objective
    sequence: SequenceGroup | None
    meter: Meter
    checkpoints: Checkpoints
    agreement: Agreement
    guard: StepGuard
    pulse: HeartbeatWriter
    evaluate: Callable[[], Figures] | None
    reporter: Reporter
    rank: int


def train(run: TrainingRun, state: TrainState) -> TrainState:
    """Train until the plan's last step or a stop request that all ranks agree on.

    Returns:
        The last state; its checkpoint is on disk, or being written (`Checkpoints.finish`).

    Raises:
        UserError: The step guard ends the run, or a checkpoint cannot be written.
    """
    plan, engine, recipe = run.plan, run.engine, run.plan.recipe
    assert plan.num_steps is not None
    window, tally = _Window(), Tally()
    noise = NoiseScale(engine, plan.batch.packs_per_step) if recipe.track.noise_scale else None
    state = _finish_evaluation(run, state)
    stop = state.held_back is not None
    while state.step < plan.num_steps and not stop:
        learning_rate = learning_rate_at(state.step, plan.num_steps, recipe.optimizer.learning_rate, recipe.schedule)
        if state.step + 1 in run.guard.skipped_steps:
            state, agreed, decision = _skip_step(run, state)
        else:
            run.pulse.phase("data", state.step)
            with run.meter.data():
                batch = run.loader.step(state.step)
            # --- one optimizer step --------------------------------------------------------------
            seed_step(recipe.seed, state.step, run.rank)
            set_learning_rate(engine.optimizer, learning_rate)  # before: ZeRO steps inside the last backward
            losses = _forward_backward(run, batch, tally, noise)
            run.pulse.phase("optimizer")
            engine.step()
            # --- what all ranks know of it -------------------------------------------------------
            loss_sum, grad_norm = engine.finish_step(losses)  # the only wait for the device
            agreed = run.agreement.after_step(engine, loss_sum, grad_norm, run.checkpoints.pending_done())
            step = StepResult(state.step + 1, batch, losses, agreed.loss_sum, grad_norm, agreed.num_bad_ranks)
            decision = run.guard.judge(step, state.recent_losses)
            state = _advanced(run, state, step, decision)
            window.add(step)
            if noise and decision.learnt:
                noise.after_step(grad_norm, batch.num_supervised_tokens)
        # --- bookkeeping -------------------------------------------------------------------------
        run.checkpoints.publish(agreed.written)
        state = replace(state, elapsed_seconds=run.meter.elapsed_seconds)
        due = _what_is_due(run, state, agreed)
        if due.report or decision.is_reported:
            figures = (
                decision.figures | (_read(run, state, window, learning_rate) if window else {}) | tally.take(engine)
            )
            figures |= (noise.figures() if noise else {}) | run.checkpoints.take_figures()
            state = _report(run, state, figures, decision, due)
        if due.save or state.held_back is not None:
            _save(run, state)
        stop = agreed.stop or state.held_back is not None
    return state


def _skip_step(run: TrainingRun, state: TrainState) -> tuple[TrainState, Agreed, StepDecision]:
    """Pass over a recorded bad step: nothing is computed, and the schedule moves on."""
    run.pulse.phase("optimizer", state.step)
    decision = StepDecision(learnt=False, figures=run.guard.figures(state.step + 1))
    agreed = run.agreement.between_steps(run.engine, run.checkpoints.pending_done())
    return state.advanced(0), agreed, decision


def _forward_backward(run: TrainingRun, batch: StepBatch, tally: Tally, noise: NoiseScale | None) -> list[Tensor]:
    """Run every micro-batch of a step forward and backward; under ZeRO the last one also steps.

    Returns:
        Sum of unit losses of each micro-batch, on the device.
    """
    engine = run.engine
    objective = run.objective.for_step(engine, batch.micro_batches, run.sequence)
    factor = engine.gradient_factor / batch.divisor
    count = len(batch.micro_batches)
    losses = []
    for index, micro_batch in enumerate(batch.micro_batches, start=1):
        with engine.micro_step(is_last=index == count), note_micro_batch(micro_batch, index, count):
            run.pulse.phase("forward")
            loss_sum, figures = objective(engine.model, micro_batch, engine.device, run.sequence)
            tally.add(figures)
            run.pulse.phase("backward")
            if engine.steps_in_backward and not math.isfinite(*engine.sum_over_ranks([float(loss_sum)])):
                engine.refuse()
            else:
                engine.backward(scaled_loss(loss_sum, factor))
        losses.append(loss_sum.detach())
        if noise and index == 1:
            noise.after_first_pass(micro_batch, factor)
    return losses


def _advanced(run: TrainingRun, state: TrainState, step: StepResult, decision: StepDecision) -> TrainState:
    """Return the state after the step; its tokens count only where the weights were updated."""
    batch = step.batch
    num_learnt = batch.num_supervised_tokens if decision.learnt else 0
    run.meter.count_step(batch.num_tokens, num_learnt, batch.num_slots)
    state = state.advanced(num_learnt, run.engine.step_was_skipped)
    return state.learnt(step.loss, run.plan.recipe.recovery.spike_window) if decision.learnt else state


@dataclass(frozen=True)
class _Due:
    """What is due after a step; saving and evaluating include a report."""

    save: bool
    evaluate: bool
    report: bool


def _what_is_due(run: TrainingRun, state: TrainState, agreed: Agreed) -> _Due:
    recipe, is_last = run.plan.recipe, state.step == run.plan.num_steps
    save = agreed.stop or agreed.checkpoint or _is_save_due(run.plan, state)
    evaluate = run.evaluate is not None and _is_due(state.step, recipe.evaluation.every_steps, is_last)
    return _Due(save, evaluate, save or evaluate or _is_due(state.step, recipe.track.every_steps, is_last))


def _is_save_due(plan: RunPlan, state: TrainState) -> bool:
    is_last = state.step == plan.num_steps
    return not plan.is_trial and _is_due(state.step, plan.recipe.checkpoint.every_steps, is_last)


def _is_due(step: int, every: int | None, is_last: bool) -> bool:
    return is_last or (every is not None and step % every == 0)


def _report(run: TrainingRun, state: TrainState, figures: Figures, decision: StepDecision, due: _Due) -> TrainState:
    """Report a step, with the validation loss where it is due; raises what the decision ends the run with."""
    if decision.ends is None and due.evaluate:
        return _evaluate(run, state, figures, due.save)
    run.reporter.step(state, figures)
    if decision.ends is not None:
        raise decision.ends
    return state


def _evaluate(run: TrainingRun, state: TrainState, figures: Figures, saving: bool) -> TrainState:
    """Measure the validation loss and report it with the step's figures.

    A stop request interrupts it: the figures are then held back in the state, and the resumed run starts here.
    """
    assert run.evaluate is not None
    run.pulse.phase("evaluate", state.step)
    try:
        with run.meter.other():
            validation = run.evaluate()
    except Stopped:
        return replace(state, held_back=figures)
    if saving:  # only a step with a checkpoint can be the best one
        state = state.evaluated(validation["evaluation/loss"])
    run.reporter.step(state, figures | validation)
    return state


def _finish_evaluation(run: TrainingRun, state: TrainState) -> TrainState:
    """Do the evaluation that a stop request interrupted in the attempt before."""
    if state.held_back is None:
        return state
    return _evaluate(run, replace(state, held_back=None), state.held_back, saving=_is_save_due(run.plan, state))


def _save(run: TrainingRun, state: TrainState) -> None:
    run.pulse.phase("save", state.step)
    with run.meter.other():
        run.reporter.sync()  # no checkpoint may be of a later step than the figures on disk
        run.checkpoints.save(state)
    run.agreement.saved()


class _Window:
    """The computed steps since the last reading; false while there are none."""

    def __init__(self) -> None:
        self._loss_sum, self._num_units = 0.0, 0
        self.grad_norm = math.nan

    def __bool__(self) -> bool:
        return self._num_units > 0

    def add(self, step: StepResult) -> None:
        self._loss_sum += step.loss_sum
        self._num_units += step.batch.num_units
        self.grad_norm = step.grad_norm

    def take_loss(self) -> float:
        """Return the loss per unit over all ranks, and start again; not finite where one step's loss is not."""
        loss = self._loss_sum / self._num_units
        self._loss_sum, self._num_units = 0.0, 0
        return loss


def _read(run: TrainingRun, state: TrainState, window: _Window, learning_rate: float) -> Figures:
    """Return the figures of the steps since the last reading."""
    peak = torch.cuda.max_memory_allocated() if run.engine.device.type == "cuda" else None
    assert run.plan.steps_per_epoch is not None
    epoch = state.step / run.plan.steps_per_epoch
    figures = run.meter.read(window.take_loss(), learning_rate, window.grad_norm, epoch, peak)
    scale = run.engine.loss_scale
    if scale is not None:  # fp16 only
        figures |= {"train/loss_scale": scale, "train/skipped_steps": state.num_skipped_steps}
    return figures
