"""The learning rate: a plain function of the recipe and the step."""

from __future__ import annotations

import math

from packhorse.recipe.schema import ScheduleSection


def learning_rate_at(step: int, num_steps: int, peak: float, schedule: ScheduleSection) -> float:
    """Learning rate of optimizer step `step`, counted from 0.

    Linear warm-up whose first step is above 0, then the schedule's course down to `final_ratio` of the peak. The forms
    are those of `transformers.get_cosine_schedule_with_warmup`, `get_linear_…`, `get_constant_…` and of
    `get_wsd_schedule` with a linear decay; the warm-up is shifted by one step so that no step is lost to a learning
    rate of 0.
    """
    warmup = warmup_steps(num_steps, schedule)
    if step < warmup:
        return peak * (step + 1) / warmup
    start = max(warmup, num_steps - decay_steps(num_steps, schedule)) if schedule.name == "wsd" else warmup
    progress = max(0, step - start) / max(1, num_steps - start)
    share = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "wsd": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[schedule.name]
    return peak * (schedule.final_ratio + (1.0 - schedule.final_ratio) * share)


def warmup_steps(num_steps: int, schedule: ScheduleSection) -> int:
    """Steps over which the learning rate rises."""
    if schedule.warmup_steps is not None:
        return schedule.warmup_steps
    return math.ceil(num_steps * schedule.warmup_ratio)


def decay_steps(num_steps: int, schedule: ScheduleSection) -> int:
    """Steps over which `wsd` goes down, at the end."""
    return math.ceil(num_steps * schedule.decay_ratio)
