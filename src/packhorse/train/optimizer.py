"""Optimizer and learning rate, both plain functions of the recipe and the step."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import nn
from torch.optim import AdamW, Optimizer

from packhorse.recipe.schema import OptimizerSection, ScheduleSection


def make_optimizer(model: nn.Module, section: OptimizerSection) -> AdamW:
    """AdamW over the trainable parameters; biases and norms, which have one dimension, do not decay."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # ZeRO-3 keeps the true shape beside an emptied tensor.
    matrices = [p for p in trained if len(getattr(p, "ds_shape", p.shape)) > 1]
    vectors = [p for p in trained if len(getattr(p, "ds_shape", p.shape)) <= 1]
    groups = [
        {"params": matrices, "weight_decay": section.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return AdamW(
        [group for group in groups if group["params"]],
        lr=section.learning_rate,
        betas=section.betas,
        eps=section.epsilon,
        # Measured on the CPU: 19 ms for 21.5 million parameters, 144 ms unfused (a twentieth of a small step).
        fused=True,
    )


def learning_rate_at(step: int, num_steps: int, peak: float, schedule: ScheduleSection) -> float:
    """Learning rate of optimizer step `step`, counted from 0.

    Linear warm-up whose first step is above 0, then the schedule's course down to `final_ratio` of the peak.
    The form is that of `transformers.get_cosine_schedule_with_warmup`, shifted by one step so that no step is lost
    to a learning rate of 0.
    """
    warmup = warmup_steps(num_steps, schedule)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    share = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[schedule.name]
    return peak * (schedule.final_ratio + (1.0 - schedule.final_ratio) * share)


def warmup_steps(num_steps: int, schedule: ScheduleSection) -> int:
    """Steps over which the learning rate rises."""
    if schedule.warmup_steps is not None:
        return schedule.warmup_steps
    return math.ceil(num_steps * schedule.warmup_ratio)


def set_learning_rate(optimizer: Optimizer, value: float) -> None:
    """Sets it for every group; before the backward pass, because ZeRO steps inside the last one."""
    for group in _groups(optimizer):
        group["lr"] = value


def _groups(optimizer: Optimizer) -> Iterable[dict[str, object]]:
    return optimizer.param_groups
