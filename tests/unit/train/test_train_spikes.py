"""A loss that jumps is told from one that scatters, whatever its size."""

from __future__ import annotations

import random

import pytest
import torch

from packhorse.train.guard.spikes import spike_score

WINDOW = 64


def losses(level: float, scatter: float, count: int = WINDOW) -> list[float]:
    source = random.Random(0)
    return [source.gauss(level, scatter) for _ in range(count)]


def test_the_score_is_that_of_torch() -> None:
    before = losses(2.0, 0.1)
    window = torch.tensor(before, dtype=torch.float64)
    median = window.quantile(0.5)
    expected = (2.9 - median) / (1.4826 * (window - median).abs().quantile(0.5))
    assert spike_score(2.9, before, WINDOW) == pytest.approx(float(expected), rel=1e-12)


def test_of_noise_nothing_is_a_spike_and_of_a_jump_each_step_until_it_is_the_rule() -> None:
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


def test_a_loss_that_falls_is_none() -> None:
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
