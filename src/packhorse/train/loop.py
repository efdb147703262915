"""The step loop. One optimizer step consumes the packs that the batch plan fixes, whatever the number of ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from packhorse.data.packs.loader import PackLoader, StepBatch
from packhorse.errors import UserError
from packhorse.model.sequence import SequenceGroup
from packhorse.plan.run_plan import RunPlan
from packhorse.record.heartbeat import Pulse
from packhorse.track.meter import Figures, Meter, evaluation_figures
from packhorse.train.agreement import Agreed, Agreement
from packhorse.train.checkpoint import Checkpoints
from packhorse.train.engine import Engine
from packhorse.train.forward import micro_batch_loss
from packhorse.train.noise import NoiseScale
from packhorse.train.optimizer import set_learning_rate
from packhorse.train.report import Reporter
from packhorse.train.schedule import learning_rate_at
from packhorse.train.signals import Stopped
from packhorse.train.state import TrainState, seed_step


@dataclass(frozen=True)
class Run:
    """What the loop works with.

    Attributes:
        sequence: The ranks that share each pack with this one, None where packs are not cut.
        agreement: What all ranks were asked for, between two steps.
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
    pulse: Pulse
    evaluate: Callable[[], float] | None
    reporter: Reporter
    rank: int


def train(run: Run, state: TrainState) -> TrainState:
    """Trains until the plan's last step or a stop request that all ranks agree on.

    Returns:
        The state at the end; a checkpoint of it is on disk.

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
        run.pulse.phase("data", state.step)
        with run.meter.data():
            batch = run.loader.step(state.step)
        # --- one optimizer step ------------------------------------------------------------------
        seed_step(recipe.seed, state.step, run.rank)
        learning_rate = learning_rate_at(state.step, plan.num_steps, peak, schedule)
        set_learning_rate(engine.optimizer, learning_rate)  # before: ZeRO steps inside the last backward
        _compute_gradients(run, batch, window, noise)
        run.pulse.phase("optimizer")
        grad_norm = engine.step()
        # --- bookkeeping -------------------------------------------------------------------------
        state = state.advanced(batch.num_supervised_tokens, engine.step_was_skipped)
        if noise:
            noise.after_step(float(grad_norm), batch.num_supervised_tokens)
        window.count(batch.num_supervised_tokens)
        run.meter.count_step(batch.num_tokens, batch.num_supervised_tokens, batch.num_slots)
        agreed = run.agreement.between_steps(engine)
        last = state.step == plan.num_steps
        saving = agreed.stop or agreed.checkpoint or _saving_due(plan, state)
        evaluating = run.evaluate is not None and _due(state.step, recipe.evaluation.every_steps, last)
        state = replace(state, elapsed_seconds=run.meter.elapsed_seconds)
        if saving or evaluating or _due(state.step, recipe.track.every_steps, last):  # also proves the loss finite
            loss, norm = window.read(engine), float(grad_norm)
            _refuse_unless_finite(loss, 0.0 if engine.step_was_skipped else norm, state.step)
            figures = run.meter.read(loss, learning_rate, norm, _epoch(run, state), _peak(engine))
            figures |= _scale_figures(engine, state) | (noise.figures() if noise else {})
            if evaluating:
                state = _evaluate(run, state, figures, saving)
            else:
                run.reporter.step(state, figures)
        if saving or state.held_back is not None:
            run.pulse.phase("save", state.step)
            with run.meter.other():
                run.checkpoints.save(state)
            run.agreement.done(agreed)
        agreed = replace(agreed, stop=agreed.stop or state.held_back is not None)
    return state


def _compute_gradients(run: Run, batch: StepBatch, window: _LossWindow, noise: NoiseScale | None) -> None:
    """Forward and backward of every pass of a step; under ZeRO the last one also steps."""
    engine = run.engine
    factor = engine.gradient_factor / batch.num_supervised_tokens
    for index, micro_batch in enumerate(batch.micro_batches, start=1):
        with engine.micro_step(is_last=index == len(batch.micro_batches)):
            run.pulse.phase("forward")
            loss_sum = micro_batch_loss(engine.model, micro_batch, engine.device, run.sequence)
            run.pulse.phase("backward")
            engine.backward(loss_sum * factor)
        window.add(loss_sum)
        if noise and index == 1:
            noise.after_first_pass(micro_batch, factor)


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


def _saving_due(plan: RunPlan, state: TrainState) -> bool:
    return _due(state.step, plan.recipe.checkpoint.every_steps, state.step == plan.num_steps)


def _refuse_unless_finite(loss: float, grad_norm: float, step: int) -> None:
    """A loss before the update can be finite while the gradient is not, and clipping spreads that to every weight."""
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise UserError(
            f"at step {step} the loss is {loss} and the gradient norm {grad_norm}.",
            "weights that such a step has touched are no longer numbers; the last checkpoint stands.",
            "lower optimizer.learning_rate or raise schedule.warmup_ratio, and train again under another name.",
        )


def _scale_figures(engine: Engine, state: TrainState) -> Figures:
    """What fp16 did to keep its gradients in range; nothing under other precisions."""
    scale = engine.loss_scale
    return {} if scale is None else {"train/loss_scale": scale, "train/skipped_steps": state.num_skipped_steps}


def _due(step: int, every: int | None, last: bool) -> bool:
    return last or (every is not None and step % every == 0)


def _epoch(run: Run, state: TrainState) -> float:
    assert run.plan.steps_per_epoch is not None
    return state.step / run.plan.steps_per_epoch


def _peak(engine: Engine) -> int | None:
    return torch.cuda.max_memory_allocated() if engine.device.type == "cuda" else None


class _LossWindow:
    """Loss sums since the last reading, kept on the device: adding waits for nothing."""

    def __init__(self) -> None:
        self._sums: list[Tensor] = []
        self._num_tokens = 0

    def add(self, loss_sum: Tensor) -> None:
        self._sums.append(loss_sum.detach())

    def count(self, num_supervised_tokens: int) -> None:
        self._num_tokens += num_supervised_tokens

    def read(self, engine: Engine) -> float:
        """Nats per supervised token over all ranks since the last reading."""
        (total,) = engine.sum_over_ranks([float(torch.stack(self._sums).double().sum())])
        loss = total / self._num_tokens
        self._sums, self._num_tokens = [], 0
        return loss
