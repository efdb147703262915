"""Counters of a run: when the validation loss has ended it, and which step was the best."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest

from packhorse.plan.run_plan import RunPlan
from packhorse.train.state import TrainState
from saving_cases import make_run


def stopping(folder: Path, patience: int, min_delta: float = 0.0) -> RunPlan:
    plan = make_run(folder, make=False)
    section = {"every_steps": 1, "early_stopping": {"patience": patience, "min_delta": min_delta}}
    recipe = type(plan.recipe).model_validate({**plan.recipe.model_dump(), "evaluation": section})
    return plan.model_copy(update={"recipe": recipe, "num_steps": 99})


def evaluations(plan: RunPlan, losses: list[float]) -> TrainState:
    """The state after one evaluation per step, up to the one that ends the run."""
    state = TrainState()
    section = plan.recipe.evaluation.early_stopping
    for loss in losses:
        state = state.advanced(1).evaluated(loss, section.min_delta if section else 0.0)
        state = TrainState.of(json.loads(json.dumps(asdict(state))))  # as if each step were resumed from
        if state.is_trained(plan):
            break
    return state


@pytest.mark.parametrize(
    ("losses", "patience", "min_delta", "end"),
    [
        ([3.0, 2.0, 2.1, 2.05, 1.0], 2, 0.0, 4),
        ([3.0, 2.0, 2.1, 1.9, 2.0, 1.95], 2, 0.0, 6),
        ([3.0, 3.0, 3.0], 2, 0.0, 3),  # an equal loss is no improvement
        ([3.0, 2.9, 2.8, 2.7], 3, 0.25, None),  # slow decreases add up: the third is 0.3 lower
        ([3.0, 2.9, 2.8, 2.76], 3, 0.25, 4),
        ([math.nan, math.inf, math.nan], 3, 0.0, 3),
        ([3.0, math.nan, 2.0, math.nan], 2, 0.0, None),
        ([9.0] * 5, 9, 0.0, None),
    ],
)
def test_the_run_ends_after_evaluations_without_improvement(
    losses: list[float], patience: int, min_delta: float, end: int | None, tmp_path: Path
) -> None:
    plan = stopping(tmp_path, patience, min_delta)
    state = evaluations(plan, losses)
    assert state.is_trained(plan) == (end is not None)
    assert state.step == (end or len(losses))
    assert bool(state.early_stop_words(plan)) == state.is_trained(plan)


def test_the_words_name_steps_and_losses(tmp_path: Path) -> None:
    plan = stopping(tmp_path, 2, 0.01)
    assert evaluations(plan, [3.0, 2.5, 2.5, 2.6]).early_stop_words(plan) == (
        "stopped early at step 4: the validation loss has not improved by more than 0.01 in 2 evaluations since"
        " step 2 (2.5000)"
    )


def test_a_held_back_evaluation_keeps_the_run_open(tmp_path: Path) -> None:
    plan = stopping(tmp_path, 2)
    assert not TrainState(step=99, held_back={"train/loss": 1.0}).is_trained(plan)
    assert TrainState(step=99).is_trained(plan)


def test_a_loss_that_is_not_finite_is_never_the_best() -> None:
    state = TrainState()
    for step, loss in enumerate([math.inf, 2.0, math.nan, 3.0], start=1):
        state = state.advanced(1).saved_with(loss)
        assert state.best_step == (None if step == 1 else 2)


def test_a_checkpoint_of_an_older_version_has_no_counters() -> None:
    record = asdict(TrainState(step=3, best_step=2, best_loss=1.5))
    for name in ("improved_step", "improved_loss", "num_without_improvement"):
        del record[name]
    assert TrainState.of(record) == TrainState(step=3, best_step=2, best_loss=1.5)
