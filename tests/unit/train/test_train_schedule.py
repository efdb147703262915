"""The learning rate against transformers' own schedules."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from packhorse.recipe.schema import OptimizerSection, ScheduleSection
from packhorse.train.optimizer import learning_rate_at, make_optimizer

STEPS, WARMUP, PEAK = 50, 7, 3e-4


def theirs(name: str) -> list[float]:
    """transformers counts from a learning rate of 0; ours starts one step later on the same ramp."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=PEAK)
    schedule = {
        "cosine": lambda: get_cosine_schedule_with_warmup(optimizer, WARMUP, STEPS),
        "linear": lambda: get_linear_schedule_with_warmup(optimizer, WARMUP, STEPS),
        "constant": lambda: get_constant_schedule_with_warmup(optimizer, WARMUP),
    }[name]()
    values = []
    for _ in range(STEPS):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return values


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_the_course_is_that_of_transformers(name: str) -> None:
    schedule = ScheduleSection(name=name, warmup_steps=WARMUP)
    ours = [learning_rate_at(step, STEPS, PEAK, schedule) for step in range(STEPS)]
    assert ours[:WARMUP] == pytest.approx(theirs(name)[1 : WARMUP + 1])
    assert ours[WARMUP:] == pytest.approx(theirs(name)[WARMUP:])
    assert ours[0] > 0


def test_the_floor_is_a_share_of_the_peak() -> None:
    schedule = ScheduleSection(name="cosine", warmup_ratio=0.0, final_ratio=0.1)
    assert learning_rate_at(10**6, 10**6, PEAK, schedule) == pytest.approx(PEAK * 0.1)
    assert learning_rate_at(0, 10**6, PEAK, schedule) == pytest.approx(PEAK)


def test_norms_and_biases_do_not_decay_and_frozen_weights_are_left_out() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3), torch.nn.Linear(3, 1))
    model[2].weight.requires_grad_(False)
    optimizer = make_optimizer(model, OptimizerSection(learning_rate=1e-3, weight_decay=0.1))
    by_decay = {group["weight_decay"]: [tuple(p.shape) for p in group["params"]] for group in optimizer.param_groups}
    assert by_decay == {0.1: [(3, 2)], 0.0: [(3,), (3,), (3,), (1,)]}
