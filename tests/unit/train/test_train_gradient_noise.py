"""The gradient noise scale against a model whose gradients have a known mean and variance."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from packhorse.train.gradient_noise import NoiseScale, estimate

TOKENS, PARTS = 64, 8


def test_the_estimates_have_no_bias() -> None:
    """Gradients of tokens drawn from a normal distribution: |G|² = 9, tr(Σ) = 50 x 4."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.zeros(50)
    mean[0] = 3.0
    signals, noises = [], []
    for _ in range(4000):
        gradients = mean + 2.0 * torch.randn(TOKENS, 50, generator=generator)
        parts = gradients.view(PARTS, -1, 50).mean(1)
        part_square = float(parts.square().sum(1).mean())
        signal, noise = estimate(part_square, PARTS / TOKENS, float(gradients.mean(0).square().sum()), 1 / TOKENS)
        signals.append(signal)
        noises.append(noise)
    assert sum(signals) / len(signals) == pytest.approx(9.0, rel=0.02)
    assert sum(noises) / len(noises) == pytest.approx(200.0, rel=0.02)


def measure(steps: int, noise: float) -> NoiseScale:
    """Steps of a linear model whose token gradients are 3 + noise x normal, in the loop's own order."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(200))
    model = SimpleNamespace(parameters=lambda: [weight])
    engine: Any = SimpleNamespace(model=model, sum_over_ranks=lambda values: values)
    scale = NoiseScale(engine, packs_per_step=16)
    factor = 1 / TOKENS
    for _ in range(steps):
        rows = 3.0 / math.sqrt(200) + noise * torch.randn(TOKENS, 200, generator=generator)
        weight.grad = None
        for part in range(PARTS):
            tokens = rows[part::PARTS]
            ((tokens @ weight).sum() * factor).backward()
            if part == 0:
                passed: Any = SimpleNamespace(targets=torch.zeros(len(tokens)))
                scale.after_first_pass(passed, factor)
        assert weight.grad is not None
        scale.after_step(float(weight.grad.norm()), TOKENS)
    return scale


def test_a_run_shows_it_in_packs() -> None:
    # tr(Σ) / |G|² = 200 x 0.25 / 9 tokens, and a step of 64 tokens has 16 packs.
    (figure,) = measure(600, 0.5).figures().values()
    assert figure == pytest.approx(200 * 0.25 / 9 / 4, rel=0.25)
    assert measure(0, 0.5).figures() == {}


def test_a_null_pack_in_the_first_pass_is_left_out() -> None:
    scale = measure(5, 0.5)
    before = scale.figures()
    null: Any = SimpleNamespace(targets=torch.zeros(0))
    scale.after_first_pass(null, 1.0)
    scale.after_step(100.0, TOKENS)
    assert scale.figures() == before
