"""Decisions of the step guard, without a launch: engines and ranks are in tests/faults/test_numbers.py."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from packhorse.data.packs.batches import BatchPlan
from packhorse.data.packs.loader import PackLoader
from packhorse.data.packs.store import open_store
from packhorse.errors import EXIT_NOT_FINITE, EXIT_STOPPED, UserError
from packhorse.plan.make_plan import make_plan
from packhorse.plan.run_plan import RunPlan
from packhorse.plan.topology import DeviceRequest, Hardware
from packhorse.recipe.schema import Recipe
from packhorse.run_folder.skipped_steps import read_skipped_steps, write_skipped_steps
from packhorse.train.engine.engine import Engine
from packhorse.train.guard.step_guard import StepDecision, StepGuard, StepResult, scaled_loss, spike_score
from packhorse.train.objectives.objective import TokenObjective
from packhorse.train.ranks.attempt import AnotherAttempt
from prepared import write_prepared
from tiny import TINY

WINDOW = 64


OPTIMIZERS: dict[str, Any] = {
    "decides on the device": partial(torch.optim.AdamW, lr=0.1, fused=True),
    "the host decides": partial(torch.optim.Muon, lr=0.1),
}


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    model = nn.Linear(4, 4, bias=False)
    optimizer = OPTIMIZERS[getattr(request, "param", "decides on the device")](model.parameters())
    yield Engine(accelerator, *accelerator.prepare(model, optimizer), 1.0, 1.0, None)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def loader(tmp_path: Path) -> Iterator[PackLoader]:
    documents: Any = [([1, 2, 3, number], [0, 1, 1, 1], {}) for number in range(8)]
    store = open_store(write_prepared(tmp_path / "data", {"train": documents}), "train")
    made = PackLoader(store, BatchPlan(store.pack_costs, 1, seed=0), 0, 1, accumulation_steps=1, device_pin=False)
    yield made
    made.close()


def planned(folder: Path, **recovery: Any) -> RunPlan:
    sections = {"recovery": recovery, "checkpoint": {"every_steps": 5, "keep_last": 3}}
    plan = make_plan(Recipe.model_validate(TINY | sections), DeviceRequest(), Hardware(num_cores=2, gpus=()), None)
    return plan.model_copy(update={"run_folder": str(folder)})


def watch(folder: Path, engine: Engine, loader: PackLoader, **recovery: Any) -> StepGuard:
    return StepGuard(planned(folder, **recovery), engine, loader, TokenObjective(), None, True, lambda: None)


def step(loader: PackLoader, number: int, loss: float, norm: float = 1.0, bad_ranks: int = 0) -> StepResult:
    batch = loader.step(0)
    return StepResult(number, batch, [torch.tensor(loss)], loss * batch.num_supervised_tokens, norm, bad_ranks)


def weights(engine: Engine) -> Tensor:
    return torch.cat([parameter.detach().flatten().clone() for parameter in engine.model.parameters()])


@pytest.mark.parametrize("engine", OPTIMIZERS, indirect=True)
def test_an_infinite_loss_with_a_finite_gradient_is_not_stepped(engine: Engine) -> None:
    """A class of probability 0: its logit is -inf, the loss inf, and the gradient softmax minus target."""
    before = weights(engine)
    impossible = torch.tensor([0.0, 0.0, 0.0, -math.inf])
    rows, targets = torch.randn(3, 4), torch.tensor([0, 1, 3])

    def loss() -> Tensor:
        return F.cross_entropy(engine.model(rows) + impossible, targets, reduction="sum")

    loss().backward()
    assert loss().isinf()
    assert all(parameter.grad.isfinite().all() for parameter in engine.model.parameters())
    engine.optimizer.zero_grad()

    with engine.micro_step(is_last=True):
        engine.backward(scaled_loss(loss(), 0.5))
    engine.step()
    assert math.isnan(engine.finish_step([loss().detach()])[1])
    assert engine.step_was_refused
    assert torch.equal(weights(engine), before)
    assert all(parameter.grad is None for parameter in engine.model.parameters())
    assert not any(value.any() for state in engine.optimizer.state.values() for value in state.values())


def test_a_finite_loss_is_unchanged(engine: Engine) -> None:
    before = weights(engine)
    loss = engine.model(torch.randn(3, 4)).pow(2).sum()
    (ours,) = torch.autograd.grad(scaled_loss(loss, 1 / 3), [engine.model.weight], retain_graph=True)
    (plain,) = torch.autograd.grad(loss * (1 / 3), [engine.model.weight])
    assert torch.equal(ours, plain)
    loss = engine.model(torch.randn(3, 4)).pow(2).sum()
    engine.backward(scaled_loss(loss, 1 / 3))
    engine.step()
    loss_sum, norm = engine.finish_step([loss.detach()])
    assert loss_sum == pytest.approx(loss.item())
    assert math.isfinite(norm)
    assert not engine.step_was_refused
    assert not torch.equal(weights(engine), before)


def test_a_spike_is_reported_with_its_score_and_training_continues(
    tmp_path: Path, engine: Engine, loader: PackLoader, caplog: pytest.LogCaptureFixture
) -> None:
    guard = watch(tmp_path, engine, loader, on_spike="warn")
    recent = [2.0, 2.1] * 16
    assert guard.judge(step(loader, 33, 2.3), recent) == StepDecision()
    with caplog.at_level(logging.WARNING):
        decision = guard.judge(step(loader, 34, 5.0), recent)
    assert decision.learnt
    assert decision.ends is None
    assert decision.figures["recovery/spike_score"] > 8
    assert "step 34: the loss is 5, " in caplog.text


def test_a_rewind_takes_back_every_checkpoint_that_holds_its_steps(
    tmp_path: Path, engine: Engine, loader: PackLoader
) -> None:
    for number in (25, 28, 29, 30, 33):
        (tmp_path / "checkpoints" / f"step-{number:06d}").mkdir(parents=True)
    guard = watch(tmp_path, engine, loader, on_spike="rewind")
    decision = guard.judge(step(loader, 33, 5.0), [2.0, 2.1] * 16)
    assert isinstance(decision.ends, AnotherAttempt)
    assert (decision.ends.again, decision.ends.exit_code) == ("rewind", EXIT_STOPPED)
    assert list(read_skipped_steps(tmp_path)) == [29, 30, 31, 32, 33]
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["step-000025", "step-000028"]


def test_a_rewind_too_many_takes_nothing_back(tmp_path: Path, engine: Engine, loader: PackLoader) -> None:
    write_skipped_steps(tmp_path, dict.fromkeys(range(1, 7), "a spike"))
    (tmp_path / "checkpoints" / "step-000030").mkdir(parents=True)
    guard = watch(tmp_path, engine, loader, on_spike="rewind")
    decision = guard.judge(step(loader, 33, 5.0), [2.0, 2.1] * 16)
    assert isinstance(decision.ends, UserError)
    assert not isinstance(decision.ends, AnotherAttempt)
    assert decision.ends.exit_code == EXIT_NOT_FINITE
    assert "11 steps would be skipped, and recovery.most_skipped is 10" in str(decision.ends)
    assert len(read_skipped_steps(tmp_path)) == 6
    assert (tmp_path / "checkpoints" / "step-000030").is_dir()


def test_ranks_that_do_not_agree_on_a_gradient_end_the_run(tmp_path: Path, engine: Engine, loader: PackLoader) -> None:
    """Some have stepped, others not: skipping the step would give them different weights."""
    engine.step_was_refused = True
    plan = planned(tmp_path, on_nonfinite="skip")
    two = plan.topology.model_copy(update={"processes_per_node": 2})
    guard = StepGuard(plan, engine, loader, TokenObjective(), None, True, lambda: None)
    guard._plan = plan.model_copy(update={"topology": two})
    decision = guard.judge(step(loader, 3, 2.0, math.nan, bad_ranks=1), [])
    assert "1 of 2 ranks have skipped it, the others have stepped" in str(decision.ends)
    assert read_skipped_steps(tmp_path) == {}


def test_skipped_steps_are_counted_up_to_a_step(tmp_path: Path, engine: Engine, loader: PackLoader) -> None:
    write_skipped_steps(tmp_path, {3: "a", 5: "b"})
    guard = watch(tmp_path, engine, loader)
    assert [guard.figures(number).get("recovery/skipped") for number in (2, 3, 4, 5, 6)] == [None, 1, 1, 2, 2]


def losses(level: float, scatter: float, count: int = WINDOW) -> list[float]:
    source = random.Random(0)
    return [source.gauss(level, scatter) for _ in range(count)]


def test_the_score_is_that_of_torch() -> None:
    before = losses(2.0, 0.1)
    window = torch.tensor(before, dtype=torch.float64)
    median = window.quantile(0.5)
    expected = (2.9 - median) / (1.4826 * (window - median).abs().quantile(0.5))
    assert spike_score(2.9, before, WINDOW) == pytest.approx(float(expected), rel=1e-12)


def test_noise_has_no_spike_and_a_jump_has_one_until_it_fills_the_window() -> None:
    before = losses(2.0, 0.1, 400)
    scores = [spike_score(before[step], before[step - WINDOW : step], WINDOW) for step in range(WINDOW, 400)]
    assert max(scores) < 5
    window, jumped = before[-WINDOW:], []
    for _ in range(WINDOW):
        score = spike_score(3.5, window, WINDOW)
        assert score is not None
        jumped.append(score > 8)
        window = [*window[1:], 3.5]
    # Half of the window may be spikes before the median moves.
    assert jumped[: WINDOW // 4] == [True] * (WINDOW // 4)
    assert not jumped[-1]


def test_a_falling_loss_is_no_spike() -> None:
    falling = [10 * 0.97**step for step in range(200)]
    scores = [spike_score(falling[step], falling[step - WINDOW : step], WINDOW) for step in range(WINDOW, 200)]
    assert max(scores) < 0


@pytest.mark.parametrize(
    ("loss", "level", "spike"), [(1e-4, 1e-5, False), (0.2, 1e-5, True), (4.2, 4.0, False), (4.4, 4.0, True)]
)
def test_a_smooth_loss_needs_more_than_its_own_scatter(loss: float, level: float, spike: bool) -> None:
    score = spike_score(loss, [level] * WINDOW, WINDOW)
    assert score is not None
    assert (score > 8) == spike


def test_there_is_no_score_before_a_quarter_of_the_window() -> None:
    assert spike_score(9.0, [1.0] * 15, WINDOW) is None
    assert spike_score(9.0, [1.0] * 16, WINDOW) is not None
