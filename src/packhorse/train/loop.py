"""The step loop. One optimizer step consumes the packs that the batch plan fixes, whatever the number of ranks."""

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
from packhorse.track.meter import Figures, Meter, evaluation_figures
from packhorse.train.checkpoint.checkpoints import Checkpoints
from packhorse.train.engine.engine import Engine
from packhorse.train.engine.optimizer import set_learning_rate
from packhorse.train.engine.schedule import learning_rate_at
from packhorse.train.guard.memory_error import noting
from packhorse.train.guard.step_guard import Judgement, Numbers, Step, times_factor
from packhorse.train.noise import NoiseScale
from packhorse.train.objectives.forward import micro_batch_loss
from packhorse.train.ranks.agreement import Agreed, Agreement
from packhorse.train.ranks.signals import Stopped
from packhorse.train.report import Reporter
from packhorse.train.state import TrainState, seed_step


@dataclass(frozen=True)
class Run:
    """What the loop works with.

    Attributes:
        sequence: The ranks that share each pack with this one, None where packs are not cut.
        agreement: What all ranks were asked for, between two steps.
        numbers: Judges each step's loss and gradient.
        pulse: Says what this rank does.
        evaluate: Measures the validation loss on all ranks, None where there are no validation rows.
            Raises Stopped where the ranks agree to stop.
    """

    plan: RunPlan
    engine: Engine
    loader: PackLoader
    sequence: SequenceGroup | None
    meter: Meter
    checkpoints: Checkpoints
    agreement: Agreement
    numbers: Numbers
    pulse: HeartbeatWriter
    evaluate: Callable[[], float] | None
    reporter: Reporter
    rank: int


def train(run: Run, state: TrainState) -> TrainState:
    """Trains until the plan's last step or a stop request that all ranks agree on.

    Returns:
        The state at the end; a checkpoint of it is on disk, or being written (`Checkpoints.finish`).

    Raises:
        UserError: Loss or gradient norm is not finite.
    """
    plan, engine, recipe = run.plan, run.engine, run.plan.recipe
    assert plan.num_steps is not None
    peak, schedule = recipe.optimizer.learning_rate, recipe.schedule
    window = _LossWindow()
    noise = NoiseScale(engine, plan.batch.packs_per_step) if recipe.track.noise_scale else None
    if state.held_back is not None:
        state = _evaluate(run, replace(state, held_back=None), state.held_back, saving=_saving_due(plan, state))
    agreed = Agreed(stop=state.held_back is not None)
    while state.step < plan.num_steps and not agreed.stop:
        learning_rate = learning_rate_at(state.step, plan.num_steps, peak, schedule)
        if state.step + 1 in run.numbers.left_out:
            state, agreed, judged = _leave_out(run, state)
        else:
            run.pulse.phase("data", state.step)
            with run.meter.data():
                batch = run.loader.step(state.step)
            # --- one optimizer step --------------------------------------------------------------
            seed_step(recipe.seed, state.step, run.rank)
            set_learning_rate(engine.optimizer, learning_rate)  # before: ZeRO steps inside the last backward
            losses = _compute_gradients(run, batch, noise)
            run.pulse.phase("optimizer")
            grad_norm = engine.step()
            # --- what all ranks know of it -------------------------------------------------------
            agreed = run.agreement.after_step(engine, losses, grad_norm, run.checkpoints.pending_done())
            step = Step(state.step + 1, batch, losses, agreed.loss_sum, grad_norm, agreed.num_bad_ranks)
            judged = run.numbers.judge(step, state.recent_losses)
            state = _advanced(run, state, step, judged)
            window.add(step)
            if noise and judged.learnt:
                noise.after_step(grad_norm, batch.num_supervised_tokens)
        # --- bookkeeping -------------------------------------------------------------------------
        run.checkpoints.publish(agreed.written)
        last = state.step == plan.num_steps
        saving = agreed.stop or agreed.checkpoint or _saving_due(plan, state)
        evaluating = run.evaluate is not None and _due(state.step, recipe.evaluation.every_steps, last)
        state = replace(state, elapsed_seconds=run.meter.elapsed_seconds)
        if saving or evaluating or judged.is_reported or _due(state.step, recipe.track.every_steps, last):
            figures = judged.figures | (_read(run, state, window, learning_rate, grad_norm) if window else {})
            figures |= (noise.figures() if noise else {}) | run.checkpoints.take_figures()
            if judged.ends is not None:
                run.reporter.step(state, figures)
                raise judged.ends
            if evaluating:
                state = _evaluate(run, state, figures, saving)
            else:
                run.reporter.step(state, figures)
        if saving or state.held_back is not None:
            _save(run, state)
            run.agreement.saved()
        agreed = replace(agreed, stop=agreed.stop or state.held_back is not None)
    return state


def _leave_out(run: Run, state: TrainState) -> tuple[TrainState, Agreed, Judgement]:
    """A step whose update is not made: nothing is computed, and the schedule goes on."""
    run.pulse.phase("optimizer", state.step)
    judged = Judgement(learnt=False, figures=run.numbers.figures(state.step + 1))
    agreed = run.agreement.between_steps(run.engine, run.checkpoints.pending_done())
    return state.advanced(0), agreed, judged


def _compute_gradients(run: Run, batch: StepBatch, noise: NoiseScale | None) -> list[Tensor]:
    """Forward and backward of every pass of a step; under ZeRO the last one also steps.

    Returns:
        The sum of token losses of each pass, on the device.
    """
    engine = run.engine
    factor = engine.gradient_factor / batch.num_supervised_tokens
    count = len(batch.micro_batches)
    losses = []
    for index, micro_batch in enumerate(batch.micro_batches, start=1):
        with engine.micro_step(is_last=index == count), noting(micro_batch, index, count):
            run.pulse.phase("forward")
            loss_sum = micro_batch_loss(engine.model, micro_batch, engine.device, run.sequence)
            run.pulse.phase("backward")
            if engine.steps_in_backward and not math.isfinite(*engine.sum_over_ranks([float(loss_sum)])):
                engine.refuse()
            else:
                engine.backward(times_factor(loss_sum, factor))
        losses.append(loss_sum.detach())
        if noise and index == 1:
            noise.after_first_pass(micro_batch, factor)
    return losses


def _advanced(run: Run, state: TrainState, step: Step, judged: Judgement) -> TrainState:
    """One step further, its tokens counted where the weights have learnt from them."""
    batch = step.batch
    num_learnt = batch.num_supervised_tokens if judged.learnt else 0
    run.meter.count_step(batch.num_tokens, num_learnt, batch.num_slots)
    state = state.advanced(num_learnt, run.engine.step_was_skipped)
    return state.learnt(step.loss, run.plan.recipe.recovery.spike_window) if judged.learnt else state


def _evaluate(run: Run, state: TrainState, figures: Figures, saving: bool) -> TrainState:
    """Measures the validation loss and reports it with the step's figures; asked to stop, it holds them back."""
    assert run.evaluate is not None
    run.pulse.phase("evaluate", state.step)
    try:
        with run.meter.other():
            validation = run.evaluate()
    except Stopped:
        return replace(state, held_back=figures)
    if saving:  # only what is on disk can be the best checkpoint
        state = state.evaluated(validation)
    run.reporter.step(state, figures | evaluation_figures(validation))
    return state


def _save(run: Run, state: TrainState) -> None:
    run.pulse.phase("save", state.step)
    with run.meter.other():
        run.reporter.settle()  # no checkpoint knows more steps than the figures on disk
        run.checkpoints.save(state)


def _saving_due(plan: RunPlan, state: TrainState) -> bool:
    return _due(state.step, plan.recipe.checkpoint.every_steps, state.step == plan.num_steps)


def _read(run: Run, state: TrainState, window: _LossWindow, learning_rate: float, grad_norm: float) -> Figures:
    """The figures of the steps since the last reading."""
    peak = torch.cuda.max_memory_allocated() if run.engine.device.type == "cuda" else None
    figures = run.meter.read(window.read(), learning_rate, grad_norm, _epoch(run, state), peak)
    return figures | _scale_figures(run.engine, state)


def _scale_figures(engine: Engine, state: TrainState) -> Figures:
    """What fp16 did to keep its gradients in range; nothing under other precisions."""
    scale = engine.loss_scale
    return {} if scale is None else {"train/loss_scale": scale, "train/skipped_steps": state.num_skipped_steps}


def _due(step: int, every: int | None, last: bool) -> bool:
    return last or (every is not None and step % every == 0)


def _epoch(run: Run, state: TrainState) -> float:
    assert run.plan.steps_per_epoch is not None
    return state.step / run.plan.steps_per_epoch


class _LossWindow:
    """The steps since the last reading; false while there are none."""

    def __init__(self) -> None:
        self._loss_sum, self._num_tokens = 0.0, 0

    def __bool__(self) -> bool:
        return self._num_tokens > 0

    def add(self, step: Step) -> None:
        self._loss_sum += step.loss_sum
        self._num_tokens += step.batch.num_supervised_tokens

    def read(self) -> float:
        """Nats per supervised token over all ranks; no number where that of one step is none."""
        loss = self._loss_sum / self._num_tokens
        self._loss_sum, self._num_tokens = 0.0, 0
        return loss
