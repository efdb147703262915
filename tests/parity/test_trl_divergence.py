"""TRL's kernels give the same divergences and gradients; its loss has no factor of the temperature."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from packhorse.train.objectives.divergence import DistilLoss, WholeTeacher, distil_sums

TOKENS, WIDTH, VOCABULARY = 300, 8, 50


@pytest.mark.parametrize(("kind", "beta"), [("forward", 0.0), ("reverse", 1.0), ("jsd", 0.5)])
def test_trl_has_the_same_divergence(kind: str, beta: float) -> None:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    torch.manual_seed(0)
    shapes = ((TOKENS, WIDTH), (VOCABULARY, WIDTH), (VOCABULARY,))
    ours = [torch.randn(shape).requires_grad_() for shape in shapes]
    theirs = [tensor.detach().clone().requires_grad_() for tensor in ours]
    teacher = [torch.randn(shape) for shape in shapes]
    temperature = 2.0
    sums = distil_sums(
        *ours, torch.zeros(TOKENS, dtype=torch.int64), WholeTeacher(*teacher), DistilLoss(kind, temperature)
    )
    divergence: Tensor = ChunkedDivergenceFunction.apply(*theirs, *teacher, beta, temperature)[0]
    assert sums[1].item() == pytest.approx(divergence.sum().item(), rel=1e-5)
    assert sums[0].item() == pytest.approx(temperature**2 * divergence.sum().item(), rel=1e-5)
    sums[0].backward()
    (divergence.sum() * temperature**2).backward()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-5)
