"""The learning rate against transformers' own schedules."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
    get_wsd_schedule,
)

from packhorse.recipe.schema import ScheduleSection
from packhorse.train.engine.optimizer import learning_rate_at

STEPS, WARMUP, DECAY, PEAK = 50, 7, 12, 3e-4


def theirs(name: str) -> list[float]:
    """transformers counts from a learning rate of 0; ours starts one step later on the same ramp."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=PEAK)
    schedule = {
        "cosine": lambda: get_cosine_schedule_with_warmup(optimizer, WARMUP, STEPS),
        "linear": lambda: get_linear_schedule_with_warmup(optimizer, WARMUP, STEPS),
        "constant": lambda: get_constant_schedule_with_warmup(optimizer, WARMUP),
        "wsd": lambda: get_wsd_schedule(optimizer, WARMUP, DECAY, STEPS, decay_type="linear"),
    }[name]()
    values = []
    for _ in range(STEPS):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return values


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "wsd"])
def test_the_course_is_that_of_transformers(name: str) -> None:
    schedule = ScheduleSection(name=name, warmup_steps=WARMUP, decay_ratio=DECAY / STEPS)
    ours = [learning_rate_at(step, STEPS, PEAK, schedule) for step in range(STEPS)]
    assert ours[:WARMUP] == pytest.approx(theirs(name)[1 : WARMUP + 1])
    assert ours[WARMUP:] == pytest.approx(theirs(name)[WARMUP:])
    assert ours[0] > 0


def test_the_floor_is_a_share_of_the_peak() -> None:
    schedule = ScheduleSection(name="cosine", warmup_ratio=0.0, final_ratio=0.1)
    assert learning_rate_at(10**6, 10**6, PEAK, schedule) == pytest.approx(PEAK * 0.1)
    assert learning_rate_at(0, 10**6, PEAK, schedule) == pytest.approx(PEAK)


def test_wsd_stays_at_the_peak_and_goes_down_to_the_floor() -> None:
    schedule = ScheduleSection(name="wsd", warmup_ratio=0.1, decay_ratio=0.2, final_ratio=0.5)
    shares = [learning_rate_at(step, 10, 1.0, schedule) for step in range(11)]
    assert shares == pytest.approx([1, 1, 1, 1, 1, 1, 1, 1, 1, 0.75, 0.5])
